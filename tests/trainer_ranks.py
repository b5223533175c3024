"""What each of the two processes of test_integration_trainer.py does: the Trainer under DDP."""

import copy

import llm_models
import torch

import cwfast


def main():
    from transformers import Trainer, TrainingArguments

    from cwfast.integrations.transformers import MASK_FILE, CWRFCallback

    class Looks(CWRFCallback):
        def on_pre_optimizer_step(self, *_, model, **__):
            """After clipping: frozen gradients were zero, or they would not be now."""
            assert not any(p.grad[masks[name]].any() for name, p in model.named_parameters())

    base = llm_models.small("llama", torch.float32)
    model = copy.deepcopy(base)
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.02)
    masks = cwfast.select({name: torch.rand(p.shape) for name, p in model.named_parameters()}, rate=0.1)
    rows = [torch.tensor(row) for row in llm_models.ids(16, shortest=12, longest=12)]
    options = {"max_steps": 4, "save_steps": 2, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    options |= {"weight_decay": 0.1, "use_cpu": True, "ddp_backend": "gloo", "report_to": [], "disable_tqdm": True}
    data = [{"input_ids": row, "labels": row} for row in rows]
    run = Trainer(
        model, TrainingArguments("out", **options), train_dataset=data, callbacks=[Looks(masks, initial=base)]
    )
    run.train()
    assert type(run.model_wrapped).__name__ == "DistributedDataParallel"
    for name, p in model.named_parameters():
        assert torch.equal(p[masks[name]], base.get_parameter(name)[masks[name]])
    assert cwfast.MaskSet.load(f"out/checkpoint-2/{MASK_FILE}") == masks


if __name__ == "__main__":
    with llm_models.without_torchvision():
        main()
