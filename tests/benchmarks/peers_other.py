"""JAX and MyGrad as contenders of cpu.py: the ViT alone, from tinytoken's weights by their names."""
import math
import os

import numpy as np


class Jax:
    """One function that XLA compiles for the step (AdamW included, its buffers donated), one for
    inference."""

    def __init__(self, name):
        global jax, jnp
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        import jax
        import jax.numpy as jnp

    def about(self):
        return {"version": jax.__version__, "threads": "XLA's pool, the CPUs of the process",
                "malloc": "as the system has it", "blas": "none: XLA's code for this processor",
                "note": "jit of the whole step"}

    def product(self, a, b):
        a, b, multiply = jnp.asarray(a), jnp.asarray(b), jax.jit(jnp.matmul)
        return lambda: multiply(a, b).block_until_ready()

    def prepare(self, work, arrays, recipe):
        if work.kind != "ViT":
            raise NotImplementedError("only the ViT is written in JAX")
        params = {name: jnp.asarray(array) for name, array in arrays["weights"].items()}
        images, labels = jnp.asarray(arrays["images"]), jnp.asarray(arrays["labels"])
        # Copies: what is donated to the compiled step may not be read again.
        zeros = lambda: {name: jnp.zeros_like(array) for name, array in params.items()}
        state = [params, zeros(), zeros(), jnp.zeros(())]
        logits_of = jax.jit(lambda params: jax_vit(params, images, work.config))

        def loss_of(params):
            log_probs = jax.nn.log_softmax(jax_vit(params, images, work.config))
            return -log_probs[jnp.arange(len(labels)), labels].mean()
        update = jax.jit(lambda *state: jax_step(loss_of, recipe, *state), donate_argnums=(0, 1, 2, 3))

        def step():
            state[:], (loss, norm) = update(*state)
            return float(loss), float(norm)

        def infer():
            return np.asarray(logits_of(state[0]))
        return step, infer, None


def jax_vit(p, images, config):
    """images (B, 3, S, S) -> logits (B, K)."""
    B, D, H, side = len(images), config["dim"], config["heads"], config["patch_size"]
    cells = config["image_size"] // side

    def linear(x, name):
        return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    def norm(x, name):
        x = x - x.mean(-1, keepdims=True)
        return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True)
                                 + 1e-6) * p[f"{name}.weight"] + p[f"{name}.bias"]

    patches = images.reshape(B, 3, cells, side, cells, side).transpose(0, 2, 4, 1, 3,
                                                                       5).reshape(B, cells * cells, -1)
    weight = p["patch_embed.proj.weight"].reshape(D, -1)
    x = patches @ weight.T + p["patch_embed.proj.bias"]
    x = jnp.concatenate([jnp.broadcast_to(p["cls_token"], (B, 1, D)), x], 1) + p["pos_embed"]
    for i in range(config["depth"]):
        block = f"blocks.{i}"
        q, k, v = linear(norm(x, f"{block}.norm1"),
                         f"{block}.attn.qkv").reshape(B, -1, 3, H, D // H).transpose(2, 0, 3, 1, 4)
        A = jax.nn.softmax(q @ k.swapaxes(-1, -2) * (D // H) ** -0.5)
        x = x + linear((A @ v).transpose(0, 2, 1, 3).reshape(x.shape), f"{block}.attn.proj")
        hidden = jax.nn.gelu(linear(norm(x, f"{block}.norm2"), f"{block}.mlp.fc1"), approximate=False)
        x = x + linear(hidden, f"{block}.mlp.fc2")
    return linear(norm(x, "norm")[:, 0], "head")


def jax_step(loss_of, recipe, params, m, v, steps):
    """Gradient, clipping, AdamW -> (new state, (loss, the gradient's norm before clipping))."""
    loss, g = jax.value_and_grad(loss_of)(params)
    norm = jnp.sqrt(sum((a * a).sum() for a in g.values()))
    scale, steps = jnp.minimum(recipe["clip"] / (norm + 1e-12), 1.0), steps + 1
    (b1, b2), new = recipe["betas"], ({}, {}, {})
    for name, w in params.items():
        gradient = g[name] * scale
        new[1][name] = b1 * m[name] + (1 - b1) * gradient
        new[2][name] = b2 * v[name] + (1 - b2) * gradient * gradient
        change = new[1][name] / (1 - b1 ** steps) / (jnp.sqrt(new[2][name] / (1 - b2 ** steps))
                                                     + recipe["eps"])
        decay = recipe["weight_decay"] if is_matrix(name, w) else 0.0
        new[0][name] = w * (1 - recipe["lr"] * decay) - recipe["lr"] * change
    return [*new, steps], (loss, norm)


def is_matrix(name, w):
    """Whether weight decay goes to this parameter."""
    return name.endswith("weight") and w.ndim > 1


class MyGrad:
    """A teaching autograd over NumPy, for scale: an op per arithmetic step, products of three axes, AdamW by
    parameter."""

    def __init__(self, name):
        global mygrad
        import mygrad
        mygrad.turn_memory_guarding_off()  # its documented switch for speed

    def about(self):
        from tinytoken.backend import blas_description
        return {"version": mygrad.__version__, "threads": "BLAS's own", "malloc": "as the system has it",
                "blas": blas_description(), "note": "GELU in its tanh form (it has no erf), memory guarding "
                                                    "off"}

    def product(self, a, b):
        return lambda: a @ b

    def prepare(self, work, arrays, recipe):
        if work.name not in ("B", "quick B"):
            raise NotImplementedError("only workload B is timed, for scale")
        params = {name: mygrad.tensor(array) for name, array in arrays["weights"].items()}
        moments = {name: (np.zeros_like(array), np.zeros_like(array)) for name,
                   array in arrays["weights"].items()}
        steps = iter(range(1, 1 << 30))

        def step():
            logits = mygrad_vit(params, arrays["images"], work.config)
            loss = mygrad.nnet.losses.softmax_crossentropy(logits, arrays["labels"])
            loss.backward()
            norm = math.sqrt(sum(float(np.vdot(w.grad, w.grad)) for w in params.values()))
            mygrad_adamw(params, moments, next(steps), min(recipe["clip"] / (norm + 1e-12), 1.0), recipe)
            return float(loss.data), norm

        def infer():
            with mygrad.no_autodiff:
                return mygrad_vit(params, arrays["images"], work.config).data
        return step, infer, None


def mygrad_vit(p, images, config):
    """images (B, 3, S, S) -> logits (B, K)."""
    B, D, H, side = len(images), config["dim"], config["heads"], config["patch_size"]
    cells = config["image_size"] // side

    def linear(x, name):
        return mygrad.matmul(x, p[f"{name}.weight"].T) + p[f"{name}.bias"]

    def norm(x, name):
        x = x - x.mean(axis=-1, keepdims=True)
        x = x / mygrad.sqrt((x * x).mean(axis=-1, keepdims=True) + 1e-6)
        return x * p[f"{name}.weight"] + p[f"{name}.bias"]

    def gelu(x):
        return 0.5 * x * (1.0 + mygrad.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * (x * x * x))))

    patches = images.reshape(B, 3, cells, side, cells, side).transpose(0, 2, 4, 1, 3,
                                                                       5).reshape(B, cells * cells, -1)
    x = mygrad.matmul(patches, p["patch_embed.proj.weight"].reshape(D, -1).T) + p["patch_embed.proj.bias"]
    x = mygrad.concatenate([mygrad.broadcast_to(p["cls_token"], (B, 1, D)), x], axis=1) + p["pos_embed"]
    for i in range(config["depth"]):
        block = f"blocks.{i}"
        packed = linear(norm(x, f"{block}.norm1"),
                        f"{block}.attn.qkv").reshape(B, -1, 3, H, D // H).transpose(2, 0, 3, 1, 4)
        q, k, v = packed[0], packed[1], packed[2]
        A = mygrad.nnet.softmax(mygrad.matmul(q, k.transpose(0, 1, 3, 2)) * (D // H) ** -0.5, axis=-1)
        x = x + linear(mygrad.matmul(A, v).transpose(0, 2, 1, 3).reshape(*x.shape), f"{block}.attn.proj")
        x = x + linear(gelu(linear(norm(x, f"{block}.norm2"), f"{block}.mlp.fc1")), f"{block}.mlp.fc2")
    return linear(norm(x, "norm")[:, 0], "head")


def mygrad_adamw(params, moments, t, scale, recipe):
    """AdamW in place, parameter by parameter."""
    (b1, b2), lr = recipe["betas"], recipe["lr"]
    for name, w in params.items():
        (m, v), g = moments[name], w.grad * scale
        m += (1 - b1) * (g - m)
        v += (1 - b2) * (g * g - v)
        if is_matrix(name, w):
            w.data *= 1 - lr * recipe["weight_decay"]
        w.data -= lr / (1 - b1 ** t) * m / (np.sqrt(v / (1 - b2 ** t)) + recipe["eps"])


PEERS = {"jax": Jax, "mygrad": MyGrad}
