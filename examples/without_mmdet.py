"""AGVM in a training loop without mmdet: deepspeed --num_gpus 2 examples/without_mmdet.py"""

import torch
from torch import Tensor, nn

import agvm_ds

CONFIG = {
    "train_micro_batch_size_per_gpu": 32,
    "gradient_accumulation_steps": 2,
    "gradient_clipping": 0.0,
    "optimizer": {"type": "AdamW", "params": {"lr": 0.003}},
    "zero_optimization": {"stage": 2},
    "agvm": {"anchor": "encoder", "interval": 5, "ema_decay": 0.9},
}


class TwoHeads(nn.Module):
    """An encoder, and two heads that read its code; forward returns the mean loss."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 32), nn.GELU())
        self.decoder = nn.Linear(32, 16)
        self.classifier = nn.Linear(32, 4)

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        code = self.encoder(x)
        return nn.functional.mse_loss(self.decoder(code), x) + nn.functional.cross_entropy(self.classifier(code), label)


torch.manual_seed(0)
engine = agvm_ds.initialize(model=TwoHeads(), config=CONFIG)[0]
random = torch.Generator().manual_seed(1 + engine.global_rank)
for update in range(1, 101):
    for _ in range(engine.gradient_accumulation_steps()):
        x = torch.randn(32, 16, generator=random).to(engine.device)
        loss = engine(x, x[:, :4].argmax(1))
        engine.backward(loss)
        engine.step()
    if update % 10 == 0 and engine.global_rank == 0:
        factors = ", ".join(f"{module} {mu:.3f}" for module, mu in engine.agvm.scale_factors.items())
        print(f"update {update}: loss {loss.item():.3f}, scale factors: {factors}", flush=True)
