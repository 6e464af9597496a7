"""GenHancer's encoder, projectors and denoiser in plain PyTorch, from tensors under our names and in our layouts."""

import math

import torch
from torch.nn import functional as F

FREQS = torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float32) / 128)


class Model:
    """Functions of a dict of tensors; `heads` and `patch` are the encoder's, `lora_scale` is alpha / rank."""

    def __init__(self, tensors, flow, heads=3, patch=7, lora_scale=1.0, freqs=FREQS):
        self.tensors, self.flow, self.heads, self.patch = tensors, flow, heads, patch
        self.lora_scale, self.freqs = lora_scale, freqs

    def linear(self, name, x):
        y = x @ self.tensors[f"{name}/kernel"]
        y = y + self.tensors[f"{name}/bias"] if f"{name}/bias" in self.tensors else y
        return y + self.lora(name, x)

    def lora(self, name, x):
        if f"{name}/lora/a" not in self.tensors:
            return 0
        pairs = zip(self.tensors[f"{name}/lora/a"], self.tensors[f"{name}/lora/b"], strict=True)
        return self.lora_scale * torch.cat([x @ a @ b for a, b in pairs], dim=-1)

    def layer_norm(self, name, x, eps):
        return F.layer_norm(x, x.shape[-1:], self.tensors[f"{name}/scale"], self.tensors[f"{name}/bias"], eps)

    @staticmethod
    def attention(q, k, v):
        """[B, N, H, D] each -> [B, N, H * D]."""
        out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))
        return out.transpose(1, 2).flatten(2)

    def clip(self, view):
        """Class token of CLIP's tower after norm and projection; view is [B, 3, R, R]."""
        p, v = self.tensors, "vision"
        x = F.conv2d(view, p[f"{v}/patch_embed/kernel"].permute(3, 2, 0, 1), stride=self.patch)
        x = x.flatten(2).transpose(1, 2)
        first = p[f"{v}/class_embed"].expand(len(x), 1, -1)
        x = self.layer_norm(f"{v}/norm_pre", torch.cat([first, x], 1) + p[f"{v}/pos_embed"], 1e-5)
        for i in range(100):
            b = f"{v}/blocks/{i}"
            if f"{b}/norm1/scale" not in p:
                break
            q, k, w = self.linear(f"{b}/attn/qkv", self.layer_norm(f"{b}/norm1", x, 1e-5)).chunk(3, -1)
            seen = self.attention(*(y.unflatten(-1, (self.heads, -1)) for y in (q, k, w)))
            x = x + self.linear(f"{b}/attn/proj", seen)
            y = self.linear(f"{b}/mlp/fc1", self.layer_norm(f"{b}/norm2", x, 1e-5))
            x = x + self.linear(f"{b}/mlp/fc2", y * torch.sigmoid(1.702 * y))
        x = self.layer_norm(f"{v}/norm", x, 1e-5)[:, 0]
        return x @ p[f"{v}/proj/matrix"] + self.lora(f"{v}/proj", x)

    def projector(self, part, e):
        y = self.linear(f"{part}/fc1", self.layer_norm(f"{part}/norm", e, 1e-5))
        return self.linear(f"{part}/fc2", F.gelu(y))

    def code(self, t):
        angles = (1000 * t)[:, None] * self.freqs
        return torch.cat([angles.cos(), angles.sin()], -1)

    def embedder(self, name, x):
        return self.linear(f"denoiser/{name}/out_layer", F.silu(self.linear(f"denoiser/{name}/in_layer", x)))

    def rms(self, name, x):
        return x * torch.rsqrt((x**2).mean(-1, keepdim=True) + 1e-6) * self.tensors[f"{name}/scale"]

    def turns(self, grid):
        """[1 + h * w, D / 2, 2, 2], from one token to the next."""
        ids = torch.tensor([(0, 0, 0)] + [(0, i, j) for i in range(grid[0]) for j in range(grid[1])]).double()
        theta = self.flow.theta
        speeds = [theta ** (-torch.arange(0, d, 2, dtype=torch.float64) / d) for d in self.flow.axes]
        angles = torch.cat([ids[:, i : i + 1] * s for i, s in enumerate(speeds)], -1)
        rows = [torch.stack([angles.cos(), -angles.sin()], -1), torch.stack([angles.sin(), angles.cos()], -1)]
        return torch.stack(rows, -2).float()

    @staticmethod
    def rotate(x, turns):
        pairs = x.unflatten(-1, (-1, 2))[..., None, :]  # [B, N, H, D/2, 1, 2]
        return (turns[None, :, None] * pairs).sum(-1).flatten(-2)

    def qkv(self, qkv, norm):
        q, k, v = (y.unflatten(-1, (self.flow.heads, -1)) for y in qkv.chunk(3, -1))
        return self.rms(f"{norm}/query_norm", q), self.rms(f"{norm}/key_norm", k), v

    def denoise(self, x, t, guidance, vec, txt, grid, seen):
        """The velocity; intermediate results go into the dict `seen`."""
        width, d = self.flow.width, "denoiser"

        def norm(y):
            return F.layer_norm(y, (width,), eps=1e-6)

        def modulation(name, n):
            return self.linear(name, F.silu(v))[:, None].chunk(n, -1)

        def mlp(name, y):
            return self.linear(f"{name}/fc2", F.gelu(self.linear(f"{name}/fc1", y), approximate="tanh"))

        parts = [self.embedder(n, y) for n, y in (
            ("time_in", self.code(t)), ("guidance_in", self.code(guidance)), ("vector_in", vec)
        )]  # fmt: skip
        v = parts[0] + parts[1] + parts[2]
        img, txt = self.linear(f"{d}/img_in", x), self.linear(f"{d}/txt_in", txt)
        seen |= dict(zip(("time_in", "guidance_in", "vector_in", "img_in", "txt_in"), (*parts, img, txt), strict=True))
        turns = self.turns(grid)
        for i in range(self.flow.double_blocks):
            streams, b = {"txt": txt, "img": img}, f"{d}/double_blocks/{i}"
            mods = {s: modulation(f"{b}/{s}_mod/lin", 6) for s in streams}
            qkv = []
            for s, y in streams.items():
                shift, scale = mods[s][:2]
                projected = self.linear(f"{b}/{s}_attn/qkv", (1 + scale) * norm(y) + shift)
                qkv.append(self.qkv(projected, f"{b}/{s}_attn/norm"))
            q, k, w = (torch.cat(y, 1) for y in zip(*qkv, strict=True))
            out = self.attention(self.rotate(q, turns), self.rotate(k, turns), w)
            joint = {"txt": out[:, : txt.shape[1]], "img": out[:, txt.shape[1] :]}
            for s, y in streams.items():
                _, _, gate1, shift2, scale2, gate2 = mods[s]
                y = y + gate1 * self.linear(f"{b}/{s}_attn/proj", joint[s])
                streams[s] = y + gate2 * mlp(f"{b}/{s}_mlp", (1 + scale2) * norm(y) + shift2)
            txt, img = streams["txt"], streams["img"]
            seen |= {f"double{i}.img": img, f"double{i}.txt": txt}
        y = torch.cat([txt, img], 1)
        for i in range(self.flow.single_blocks):
            b = f"{d}/single_blocks/{i}"
            shift, scale, gate = modulation(f"{b}/modulation/lin", 3)
            inner = self.linear(f"{b}/linear1", (1 + scale) * norm(y) + shift)
            q, k, w = self.qkv(inner[..., : 3 * width], f"{b}/norm")
            out = self.attention(self.rotate(q, turns), self.rotate(k, turns), w)
            hidden = F.gelu(inner[..., 3 * width :], approximate="tanh")
            y = y + gate * self.linear(f"{b}/linear2", torch.cat([out, hidden], -1))
            seen[f"single{i}"] = y
        shift, scale = modulation(f"{d}/final_layer/adaLN_modulation", 2)
        return self.linear(f"{d}/final_layer/linear", (1 + scale) * norm(y[:, txt.shape[1] :]) + shift)

    def forward(self, embed, latents, t_normal, noise, guidance=4.0, scale=1.0):
        """(loss, everything on the way); latents are [B, h, w, z]."""
        b, h, w, z = latents.shape
        packed = torch.empty(b, h // 2, w // 2, 4 * z)
        for c in range(z):
            for dy in range(2):
                for dx in range(2):
                    packed[..., 4 * c + 2 * dy + dx] = latents[:, dy::2, dx::2, c]
        packed = packed.flatten(1, 2)
        t = torch.sigmoid(scale * t_normal)
        x_t = (1 - t[:, None, None]) * packed + t[:, None, None] * noise
        vec, txt = self.projector("project_clip", embed), self.projector("project_t5", embed)[:, None]
        dit, g = {}, torch.full_like(t, guidance)
        pred = self.denoise(x_t, t, g, vec, txt, (h // 2, w // 2), dit)
        target = noise - packed
        seen = dict(embed=embed, vec=vec, txt=txt, packed=packed, t=t, x_t=x_t, target=target, pred=pred, guidance=g)
        return ((pred - target) ** 2).mean(), seen | {f"dit.{k}": y for k, y in dit.items()}
