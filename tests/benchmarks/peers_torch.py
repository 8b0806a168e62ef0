"""The models of tinytoken written plainly in PyTorch, and PyTorch as a contender of cpu.py and of gpu.py.

Sizes, multiply-adds, parameter names and results are tinytoken's: `load_state_dict` takes its weights as they
are.
"""
import ctypes
import os
import tempfile

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tinytoken.backend import prepare_cpu
from tinytoken.nn import start_positions
from tinytoken.ops import resize_matrix


class Attention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x, seen=None):
        B, T, D = x.shape
        q, k, v = self.qkv(x).reshape(B, T, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        out = F.scaled_dot_product_attention(q, k, v) if seen is None else self.masked(q, k, v, seen)
        return self.proj(out.transpose(1, 2).reshape(B, T, D))

    def masked(self, q, k, v, seen):
        """K e^a / sum K e^a, as tinytoken has it: the maximum of the kept keys, at most which a dropped one
        counts."""
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        highest = scores.detach().masked_fill(seen == 0, -torch.inf).amax(-1, keepdim=True)
        weights = (scores - highest).clamp(max=0).exp_() * seen
        return (weights / weights.sum(-1, keepdim=True)) @ v


class Mlp(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, dim, heads, mlp_ratio=4):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim, 1e-6), Attention(dim, heads)
        self.norm2, self.mlp = nn.LayerNorm(dim, 1e-6), Mlp(dim, dim * mlp_ratio)

    def forward(self, x, seen=None):
        x = x + self.attn(self.norm1(x), seen)
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    def __init__(self, patch, dim):
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch, patch)

    def forward(self, images):
        return self.proj(images).flatten(2).transpose(1, 2)


class ViT(nn.Module):
    """images (B, 3, S, S) -> logits (B, K)."""

    def __init__(self, image_size, patch_size, dim, depth, heads, num_classes):
        super().__init__()
        self.patch_embed, self.num_patches = PatchEmbed(patch_size, dim), (image_size // patch_size) ** 2
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.num_patches, dim))
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(dim, 1e-6), nn.Linear(dim, num_classes)

    def embed(self, images):
        return torch.cat([self.cls_token.expand(len(images), -1, -1), self.patch_embed(images)],
                         1) + self.pos_embed

    def features(self, images):
        x = self.embed(images)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def forward(self, images):
        return self.head(self.features(images)[:, 0])

    def loss(self, images, labels):
        return F.cross_entropy(self(images), labels)


class Predictor(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.in_conv = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.GELU())
        self.out_conv = nn.Sequential(nn.Linear(dim, dim // 2), nn.GELU(), nn.Linear(dim // 2, dim // 4),
                                      nn.GELU(),
                                      nn.Linear(dim // 4, 2))

    def forward(self, x, keep=None):
        local, shared = self.in_conv(x).chunk(2, -1)
        if keep is None:
            mean = shared.mean(1, keepdim=True)
        else:
            total = keep.sum(1).reshape(-1, 1, 1)
            mean = (shared * keep[..., None]).sum(1, keepdim=True) / (total + (total == 0))
        return F.log_softmax(self.out_conv(torch.cat([local, mean.expand_as(local)], -1)), -1)


class DynamicViT(ViT):
    """train mode: images, noise (B, S, N, 2) -> logits, final patch tokens, decisions; eval mode: images ->
    logits."""

    def __init__(self, *, prune_before, keep_ratios, **sizes):
        super().__init__(**sizes)
        self.prune_before, self.keep_ratios = prune_before, keep_ratios
        self.counts = [int(self.num_patches * ratio) for ratio in keep_ratios]
        self.score_predictor = nn.ModuleList(Predictor(self.norm.weight.numel()) for _ in prune_before)

    def forward(self, images, noise=None):
        x = self.embed(images)
        return self.masked(x, noise) if self.training else self.gathered(x)

    def gathered(self, x):
        stages = iter(zip(self.score_predictor, self.counts))
        for i, block in enumerate(self.blocks):
            if i in self.prune_before:
                predictor, count = next(stages)
                patches = x[:, 1:]
                places = predictor(patches)[..., 0].topk(count).indices.sort().values
                patches = patches.gather(1, places[..., None].expand(-1, -1, x.shape[2]))
                x = torch.cat([x[:, :1], patches], 1)
            x = block(x)
        return self.head(self.norm(x)[:, 0])

    def masked(self, x, noise):
        decisions, seen = [], None
        itself, ones = torch.eye(x.shape[1], device=x.device), torch.ones(x.shape[:2], device=x.device)
        for i, block in enumerate(self.blocks):
            if i in self.prune_before:
                before = decisions[-1] if decisions else ones[:, 1:]
                log_probs = self.score_predictor[len(decisions)](x[:, 1:], before)
                soft = (log_probs + noise[:, len(decisions)]).softmax(-1)[..., 0]
                decisions.append(((soft >= 0.5) + (soft - soft.detach())) * before)  # straight-through
                keep = torch.cat([ones[:, :1], decisions[-1]], 1)[:, None, None, :]
                seen = keep + (1 - keep) * itself
            x = block(x, seen)
        x = self.norm(x)
        return self.head(x[:, 0]), x[:, 1:], decisions

    def loss(self, images, labels, noise, teacher):
        with torch.no_grad():
            seen = teacher.features(images)
            wanted = teacher.head(seen[:, 0])
        logits, tokens, decisions = self(images, noise)
        ratio = sum(((d.mean(1) - r) ** 2).mean() for d, r in zip(decisions, self.keep_ratios))
        kl = F.kl_div(F.log_softmax(logits, -1), F.log_softmax(wanted, -1), reduction="batchmean",
                      log_target=True)
        keep = decisions[-1].detach()
        errors = ((tokens - seen[:, 1:]) ** 2).mean(2) * keep
        token = (errors.sum(1) / keep.sum(1).clamp(min=1)).mean()
        return F.cross_entropy(logits, labels) + 2 / len(decisions) * ratio + 0.5 * kl + 0.5 * token


class LookupBlock(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.gather_norm_q, self.gather_norm_k = nn.LayerNorm(dim, 1e-6), nn.LayerNorm(dim, 1e-6)
        self.gather_q, self.gather_k, self.gather_v = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.gather_proj, self.refine = nn.Linear(dim, dim), Block(dim, heads)
        self.infuse_norm, self.infuse_v, self.infuse_proj = nn.LayerNorm(dim, 1e-6), nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.lookup_norm, self.lookup_mlp = nn.LayerNorm(dim, 1e-6), Mlp(dim, dim // 2)

    def split(self, x):
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)

    def forward(self, lookup, small, tail=True):
        q = self.split(self.gather_norm_q(self.gather_q(small)))
        k, v = self.split(self.gather_norm_k(self.gather_k(lookup))), self.split(self.gather_v(lookup))
        A = ((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)).softmax(-1)
        small = self.refine(small + self.gather_proj((A @ v).transpose(1, 2).flatten(2)))
        if tail:
            out = A.transpose(-1, -2) @ self.split(self.infuse_v(self.infuse_norm(small)))
            lookup = lookup + self.infuse_proj(out.transpose(1, 2).flatten(2))
            lookup = lookup + self.lookup_mlp(self.lookup_norm(lookup))
        return lookup, small


class LookupViT(nn.Module):
    """train mode: images -> logits, lookup_logits; eval mode: images -> logits."""

    def __init__(self, image_size, patch_size, dim, depth, heads, num_classes, compressed):
        super().__init__()
        grid = (image_size // patch_size,) * 2
        self.patch_embed = PatchEmbed(patch_size, dim)
        self.pos_embed = nn.Parameter(torch.tensor(start_positions(grid, dim))[None])
        self.pos_embed_compressed = nn.Parameter(torch.zeros(1, compressed[0] * compressed[1], dim))
        self.blocks = nn.ModuleList(LookupBlock(dim, heads) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(dim, 1e-6), nn.Linear(dim, num_classes)
        self.lookup_norm, self.lookup_head = nn.LayerNorm(dim, 1e-6), nn.Linear(dim, num_classes)
        # As a product it is several times faster than F.interpolate(antialias=True), which gives the same.
        self.register_buffer("resize", torch.tensor(resize_matrix(grid, compressed)).float(),
                             persistent=False)

    def forward(self, images):
        x = self.patch_embed(images)
        lookup, small = x + self.pos_embed, self.resize @ x + self.pos_embed_compressed
        for i, block in enumerate(self.blocks):
            lookup, small = block(lookup, small, tail=self.training or i < len(self.blocks) - 1)
        logits = self.head(self.norm(small).mean(1))
        return (logits, self.lookup_head(self.lookup_norm(lookup).mean(1))) if self.training else logits

    def loss(self, images, labels):
        return sum(F.cross_entropy(logits, labels) for logits in self(images))


MODELS = {"ViT": ViT, "DynamicViT": DynamicViT, "LookupViT": LookupViT}


def build(kind, config, weights):
    """The model of that kind with tinytoken's weights {name: array}."""
    model = MODELS[kind](**config)
    model.load_state_dict({name: torch.from_numpy(array) for name, array in weights.items()})
    return model


def adamw(model, lr, weight_decay, **options):
    """torch.optim.AdamW with weight decay on the matrices of linear layers only, as tinytoken has it."""
    groups = {True: [], False: []}
    for name, p in model.named_parameters():
        groups[name.endswith("weight") and p.ndim > 1].append(p)
    return torch.optim.AdamW([{"params": groups[True], "weight_decay": weight_decay},
                              {"params": groups[False], "weight_decay": 0.0}], lr=lr, **options)


def macs(model, images):
    """Multiply-adds of one image in eval mode. Attention by single products: the fused kernel is not
    counted."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.eval()(torch.from_numpy(images[:1]))
    return counter.get_total_flops() // 2


def arguments(work, arrays, device="cpu"):
    """What the loss is called with: images, labels, and for DynamicViT noise and teacher."""
    batch = [torch.from_numpy(arrays[name]).to(device) for name in ("images", "labels", "noise")
             if name in arrays]
    if "teacher" in arrays:
        sizes = {k: v for k, v in work.config.items() if k not in ("prune_before", "keep_ratios")}
        batch.append(build("ViT", sizes, arrays["teacher"]).eval().to(device))
    return batch


class Torch:
    """PyTorch as a contender of cpu.py: "torch" as it comes, "torch-compile" with its functions compiled,
    "torch-malloc" with freed memory kept in the process, "torch-best" with the fused AdamW too (and what
    cpu.py preloads)."""

    def __init__(self, name):
        self.compiled, self.best = name == "torch-compile", name == "torch-best"
        keeps = name in ("torch-malloc", "torch-best")
        self.malloc = prepare_cpu() if keeps else "as the system has it"

    def about(self):
        return {"version": torch.__version__, "threads": torch.get_num_threads(), "malloc": self.malloc,
                "blas": mkl(),
                "elementwise": torch.backends.cpu.get_cpu_capability(),
                "note": "fused AdamW" if self.best else "compiled model and loss" if self.compiled else "",
                "preload": os.environ.get("LD_PRELOAD", "")}

    def product(self, a, b):
        a, b = torch.from_numpy(a), torch.from_numpy(b)
        return lambda: a @ b

    def prepare(self, work, arrays, recipe):
        model = build(work.kind, work.config, arrays["weights"])
        count = macs(model, arrays["images"])
        batch = arguments(work, arrays)
        optimizer = adamw(model, recipe["lr"], recipe["weight_decay"], fused=self.best or None)
        loss_of, logits_of = model.loss, model.forward
        if self.compiled:
            loss_of, logits_of = torch.compile(loss_of, dynamic=False), torch.compile(logits_of, dynamic=False)

        def step():
            if not model.training:
                model.train()
            loss = loss_of(*batch)
            optimizer.zero_grad()
            loss.backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), recipe["clip"])
            optimizer.step()
            return loss.item(), norm.item()

        def infer():
            if model.training:
                model.eval()
            with torch.inference_mode():
                return logits_of(batch[0]).numpy()
        return step, infer, count


def mkl():
    """What MKL says when it is told to talk: its version and, on Intel's processors, its instruction set. On
    others it names none; the rate of a product tells. It introduces itself once per process."""
    a = torch.ones(64, 64)
    with tempfile.TemporaryFile() as said:
        usual = os.dup(1)
        os.dup2(said.fileno(), 1)
        with torch.backends.mkl.verbose(torch.backends.mkl.VERBOSE_ON):
            a @ a
        ctypes.CDLL(None).fflush(None)  # it prints by C's buffered printf
        os.dup2(usual, 1)
        os.close(usual)
        said.seek(0)
        words = said.read().decode(errors="replace").partition(", Lnx")[0]
    return words.removeprefix("MKL_VERBOSE ") or "no MKL"


class OnDevice:
    """PyTorch in bf16 autocast as a contender of gpu.py. how: "eager", "graph" (a whole step as one CUDA
    graph) or "compile"."""

    optimiser = {"eager": {"fused": True}, "graph": {"fused": True, "capturable": True},
                 "compile": {"foreach": True, "capturable": True}}

    def __init__(self, how, device="cuda"):
        self.how, self.device = how, device
        torch.backends.cudnn.benchmark = True
        if how == "compile":
            torch._dynamo.config.fail_on_recompile_limit_hit = True  # it would go on uncompiled
            torch._inductor.config.autotune_num_choices_displayed = 0

    def train(self, work, arrays, recipe):
        """A function that does a training step -> loss and gradient norm, on the device."""
        model = build(work.kind, work.config, arrays["weights"]).to(self.device)
        optimizer = adamw(model, recipe["lr"], recipe["weight_decay"], **self.optimiser[self.how])

        def update():
            norm = nn.utils.clip_grad_norm_(model.parameters(), recipe["clip"])
            optimizer.step()
            return norm
        loss_of, update = self.compiled(model.loss), self.compiled(update)

        def step(*batch):
            optimizer.zero_grad()
            with self.autocast():
                loss = loss_of(*batch)
            loss.backward()
            return loss.detach(), update()
        return self.repeated(step, arguments(work, arrays, self.device))

    def infer(self, work, arrays):
        """A function that gives the logits. Weights of products are rounded once, not at each call as
        autocast would."""
        model = build(work.kind, work.config, arrays["weights"]).to(self.device).eval()
        for module in model.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                module.to(torch.bfloat16)
        forward = self.compiled(model.forward)

        def logits(images):
            with torch.inference_mode(), self.autocast():
                return forward(images)
        return self.repeated(logits, [torch.from_numpy(arrays["images"]).to(self.device)])

    def autocast(self):
        return torch.autocast(self.device, torch.bfloat16)

    def compiled(self, function):
        return torch.compile(function, mode="max-autotune",
                             dynamic=False) if self.how == "compile" else function

    def repeated(self, call, arguments):
        call = Graphed(call, arguments) if self.how == "graph" else call

        def once():
            if self.how == "compile":
                torch.compiler.cudagraph_mark_step_begin()  # what the call before gave may be written over
            return call(*arguments)
        return once

    @staticmethod
    def host(tensor):
        return tensor.detach().float().cpu().numpy()


class Graphed:
    """call(*arguments) as one CUDA graph from the fourth time on; tensors are copied in. The first three are
    ordinary calls, on a stream of their own, as PyTorch's manual has it."""

    def __init__(self, call, arguments):
        self.call, self.given = call, [a.clone() if isinstance(a, torch.Tensor) else a for a in arguments]
        self.side, self.ordinary, self.graph, self.out = torch.cuda.Stream(), 3, None, None

    def __call__(self, *arguments):
        for mine, given in zip(self.given, arguments):
            if isinstance(given, torch.Tensor):
                mine.copy_(given)
        if self.ordinary:
            return self.run_aside()
        if self.graph is None:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self.out = self.call(*self.given)
            self.graph = graph
        self.graph.replay()
        return self.out

    def run_aside(self):
        self.ordinary -= 1
        self.side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.side):
            out = self.call(*self.given)
        torch.cuda.current_stream().wait_stream(self.side)
        return out
