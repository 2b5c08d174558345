"""open_clip's training step with neuclip's loss: `python examples/open_clip_step.py`.

open_clip's `train_one_epoch` calls `loss(**model_out, output_dict=True)` and sums the values. The
losses of neuclip have the same interface; ids of the pairs are optional here.
"""

import torch
from open_clip.model import CLIP

import neuclip

torch.manual_seed(0)
model = CLIP(
    embed_dim=32,
    vision_cfg={"image_size": 16, "patch_size": 4, "width": 32, "layers": 1, "head_width": 16},
    text_cfg={"context_length": 8, "vocab_size": 64, "width": 32, "layers": 1, "heads": 2},
    output_dict=True,
)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

# loss = open_clip.create_loss(args)
loss = neuclip.create_loss("neuclip_pool", embed_dim=32, total_steps=4 * 16)

images = torch.randn(256, 3, 16, 16)
captions = torch.randint(1, 63, (256, 8)).where(torch.arange(8) < 7, 63)  # 63 is the end token
for epoch in range(4):
    total = 0.0
    for rows in torch.randperm(256).split(16):
        model_out = model(images[rows], captions[rows])
        losses = loss(**model_out, sample_ids=rows, output_dict=True)
        total_loss = sum(losses.values())
        optimizer.zero_grad()
        total_loss.backward()
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, torch.tensor(100.0).log())
        total += total_loss.item()
    print(f"epoch {epoch}: mean loss {total / 16:.4f}")
