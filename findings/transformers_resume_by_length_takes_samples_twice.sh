#!/usr/bin/env bash
# package: transformers 5.24.0 (accelerate 1.15.0, torch 2.13.0)
# date: 2026-11-30
# expected: Trainer.train(resume_from_checkpoint=...) skips the batches of the epoch that were trained before the checkpoint (ignore_data_skip=False, "to load the data at the same stage as in the previous training"), so that each sample is trained once in an epoch, with every train_sampling_strategy
# seen: with "group_by_length" that holds in the first epoch only. In each later one the skipped batches are those of another order, the one of the first epoch: of 24 samples in batches of 4, a run resumed in the middle of the second epoch never trains six in that epoch and trains six others twice. With "random" the order goes on exactly
# ours: nothing; DSALTTrainer resumes bit for bit (packages/dsalt/tests/test_training.py)
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 numpy transformers==5.24.0 accelerate==1.15.0

cat >"$work/resume.py" <<'PY'
import tempfile

import torch
from transformers import PrinterCallback, Trainer, TrainingArguments
from transformers.utils import logging

logging.set_verbosity_error()
logging.disable_progress_bar()
SAMPLES, BATCH, EPOCHS = 24, 4, 2
STEPS = SAMPLES // BATCH
lengths = torch.randint(2, 30, (SAMPLES,), generator=torch.Generator().manual_seed(0))
data = [{"input_ids": [i] * n} for i, n in enumerate(lengths.tolist())]
seen = []


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, samples):
        seen.append(samples.tolist())
        return {"loss": self.weight.square().sum()}


def collate(rows):
    return {"samples": torch.tensor([row["input_ids"][0] for row in rows])}


def train(folder, strategy, checkpoint=None):
    arguments = TrainingArguments(
        folder,
        per_device_train_batch_size=BATCH,
        num_train_epochs=EPOCHS,
        train_sampling_strategy=strategy,
        save_steps=1,
        seed=3,
        use_cpu=True,
        disable_tqdm=True,
        remove_unused_columns=False,
        logging_strategy="no",
        report_to=[],
    )
    seen.clear()
    trainer = Trainer(Model(), arguments, train_dataset=data, data_collator=collate)
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=checkpoint)
    return list(seen)


for strategy in ("random", "group_by_length"):
    with tempfile.TemporaryDirectory() as folder:
        whole = train(folder, strategy)
        for epoch in (whole[:STEPS], whole[STEPS:]):
            assert sorted(sum(epoch, [])) == list(range(SAMPLES))
        for done in (STEPS // 2, STEPS, STEPS + STEPS // 2):
            with tempfile.TemporaryDirectory() as other:
                rest = train(other, strategy, f"{folder}/checkpoint-{done}")
            last = sum(whole[STEPS:done] + rest[-min(STEPS, EPOCHS * STEPS - done) :], [])
            never = SAMPLES - len(set(last))
            print(f"{strategy}, resumed after {done} of {EPOCHS * STEPS} steps: {never} never seen")
            exact = strategy == "random" or done <= STEPS
            assert (rest == whole[done:]) == exact and (never == 0) == exact
            if not exact:
                assert rest == whole[done - STEPS : STEPS]  # the order of the first epoch
PY
HF_HUB_OFFLINE=1 "$work/venv/bin/python" -W ignore "$work/resume.py"
