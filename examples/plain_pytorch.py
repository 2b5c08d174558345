"""The default loss in your own training loop: `python examples/plain_pytorch.py`."""

import torch
from torch import nn
from torch.nn.functional import normalize

import neuclip

torch.manual_seed(0)
latent = torch.randn(2048, 16)  # the common content of an image and its caption
images, captions = latent @ torch.randn(16, 64), latent @ torch.randn(16, 48)

image_tower, text_tower = nn.Linear(64, 32), nn.Linear(48, 32)
log_scale = nn.Parameter(torch.tensor(1 / 0.07).log())
parameters = [*image_tower.parameters(), *text_tower.parameters(), log_scale]
optimizer = torch.optim.AdamW(parameters, lr=1e-2)

epochs, batch = 5, 64
total_steps = epochs * len(latent) // batch  # gamma falls over the whole of this short run
loss_fn = neuclip.create_loss("neuclip_pool", embed_dim=32, total_steps=total_steps)

for epoch in range(epochs):
    for rows in torch.randperm(len(latent)).split(batch):
        image_features = normalize(image_tower(images[rows]), dim=-1)
        text_features = normalize(text_tower(captions[rows]), dim=-1)
        loss = loss_fn(image_features, text_features, log_scale.exp(), sample_ids=rows)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    best = (image_features @ text_features.T).argmax(1)
    accuracy = (best == torch.arange(len(rows))).float().mean()
    print(f"epoch {epoch}: loss {loss:.3f}, in-batch accuracy {accuracy:.0%}", loss_fn.metrics())
