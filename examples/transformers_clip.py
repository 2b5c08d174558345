"""Hugging Face's CLIPModel with the default loss: `python examples/transformers_clip.py`.

The model has random weights; nothing is downloaded.
"""

import torch
from transformers import CLIPConfig, CLIPModel

import neuclip

torch.manual_seed(0)
tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
config = CLIPConfig(
    text_config={
        **tower, "num_attention_heads": 2, "vocab_size": 64, "max_position_embeddings": 8,
        "eos_token_id": 63, "bos_token_id": 0, "pad_token_id": 1,
    },
    vision_config={**tower, "num_attention_heads": 2, "image_size": 16, "patch_size": 4},
    projection_dim=32,
)  # fmt: skip
model = CLIPModel(config)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
loss_fn = neuclip.create_loss("neuclip_pool", embed_dim=32, total_steps=4 * 16)

images = torch.randn(256, 3, 16, 16)
captions = torch.randint(2, 63, (256, 8)).where(torch.arange(8) < 7, 63)
for epoch in range(4):
    total = 0.0
    for rows in torch.randperm(256).split(16):
        outputs = model(input_ids=captions[rows], pixel_values=images[rows])
        # image_embeds and text_embeds have unit norm already.
        features = outputs.image_embeds, outputs.text_embeds
        loss = loss_fn(*features, model.logit_scale.exp(), sample_ids=rows)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item()
    print(f"epoch {epoch}: mean loss {total / 16:.4f}")
