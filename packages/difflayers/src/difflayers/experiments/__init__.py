"""Experiments as commands: ``python -m difflayers.experiments.NAME [--quick] [--out results]``.

They need scikit-learn (digits), and matplotlib for the pictures:
``pip install difflayers[examples]``.
"""
