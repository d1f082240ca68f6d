"""--init gradient: A starts along the gradient of the full matrix, in place of a random draw.

With B = 0 the first step of B only sees G A^T, with G = dL/dW (d_out, d_in), and a random A may
miss most of G. The rows of A become the first right singular vectors of G, each with the norm of
the row that it replaces. B stays 0, so the function stays the checkpoint's. Modules that a dynamic
search turns on later keep their random A. LoRA-GA (arXiv 2407.05000) and LoRA-One (arXiv
2502.01235) start A and B from the gradient; here it is A alone.
"""

import time

import torch

import heterolora
from extras.proxies import host_gradient, mean_over
from extras.warm_up import warmed_up
from heterolora import in_eval_mode


def gradient_rows(model, adapters, batches, loss_fn):
    """Return {adapter: directions of the new rows of A (r, d_in)}, for the r ranks that are on.

    Raises FloatingPointError if a gradient is not finite.
    """
    with in_eval_mode(model):
        gradients = mean_over(batches, model, loss_fn, host_gradient)
    rows = {}
    for adapter in adapters.values():
        if adapter.rank > 0 and adapter in gradients:
            if not gradients[adapter].isfinite().all():
                raise FloatingPointError("a gradient at the start is not finite")
            _, _, Vh = torch.linalg.svd(gradients[adapter], full_matrices=False)
            rows[adapter] = Vh[: adapter.rank]  # of norm 1
    return rows


def start_along_gradients(args, model, adapters, train_set):
    """Give A new values, from gradients after a warm-up and on the first allocation's batches.

    Only the modules that are on take part. Of several warm-ups only the first is used. Returns the
    seconds that it took.
    """
    from train import generator, loss_fn  # here, as train imports this module

    begin = time.perf_counter()
    draws = generator(args.seed, "first probing")
    batches = train_set.sample(args.probe_batches, args.batch_size, draws)
    ranks = {name: adapter.rank for name, adapter in adapters.items()}
    with warmed_up(args, model, adapters, train_set):
        heterolora.set_ranks(adapters, ranks)
        rows = gradient_rows(model, adapters, batches, loss_fn)
    for adapter, values in rows.items():
        (A, slices), _ = adapter.active(adapter.rank)
        A.data[slices] = values * A.detach()[slices].norm(dim=1, keepdim=True)
    return time.perf_counter() - begin
