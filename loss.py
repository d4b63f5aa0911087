"""SvaCLR's objective: Eq. 1 (§2.1), Eq. 2 (§2.2) and Eq. 3 (§2.3) of arXiv 2309.13942.

    loss = soft_info_nce(y_a, y_v, z_a, z_v)      # y: encoder outputs, z: unit-length projections

This file needs torch alone. Symbols: B clips on this process, W processes, N = W B clips in the
global batch; K views per modality (view 0 at speed 1, view 1 at a drawn speed); C encoder width, D
projection width. Views keep an axis of their own, so that no index arithmetic decides which row
belongs to which clip:

                     clip j = i             clip j != i
    video views q    0         1            0      1
    audio p = 0      L[i,0,0]  L[i,0,1]     -      -      A "-" is a negative of every L[i,p,q] in
    audio p = 1      L[i,1,0]  L[i,1,1]     -      -      its row. The clip's own other view is
                                                          neither positive nor negative.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F


def similarities(z_a, z_v, own, eta):
    """Both parts of the fraction in Eq. 1: the similarities s and the log of the negatives' sum.

    s (B, K, N, K) = z_a . z_v / eta. log_negatives (B, K) = log sum_{j != i} sum_{q'}
    exp(s[i,p,j,q']): both speeds of all other clips, which are 2(N-1) negatives for K = 2.
    """
    N = z_v.shape[0]
    if N < 2:
        raise ValueError(f"Eq. 1 contrasts a clip with other clips, but the global batch has {N}: "
                         "give it 2 or more")
    s = torch.einsum("ipd,jqd->ipjq", z_a, z_v) / eta                   # (B, K, N, K)
    same = own[:, None] == torch.arange(N, device=own.device)           # (B, N), True where j = i
    others = s.masked_fill(same[:, None, :, None], -torch.inf)          # (B, K, N, K)
    return s, others.flatten(2).logsumexp(2)                            # (B, K, N, K), (B, K)


def nll(s, log_negatives):
    """-log( exp(s) / (exp(s) + exp(log_negatives)) ) = log(1 + exp(log_negatives - s)).

    The threshold is 50 because softplus(x) = x from there on, even in float64.
    """
    return F.softplus(log_negatives - s, threshold=50)


def info_nce(z_a, z_v, own, eta):
    """Eq. 1, with the -log that InfoNCE means:

        L[i,p,q] = -log( exp(s[i,p,i,q])
                         / ( exp(s[i,p,i,q]) + sum_{j != i} sum_{q'} exp(s[i,p,j,q']) ) )

    Args:
        z_a: (B, K, D) audio projections of this process's clips, unit length.
        z_v: (N, K, D) video projections of the global batch, unit length.
        own: (B,) int64, the position of each local clip among the N.
        eta: temperature, > 0.
    Returns:
        L (B, K, K), audio view p by video view q. Raises ValueError if N < 2.
    """
    s, log_negatives = similarities(z_a, z_v, own, eta)                 # (B, K, N, K), (B, K)
    s_own = s[torch.arange(len(own), device=own.device), :, own]        # (B, K, K), s[i,p,i,q]
    return nll(s_own, log_negatives[:, :, None])                        # (B, K, K)


def cross_affinity(y_a, y_v, scope="clip", temperature=1.0, normalize=True):
    """Eq. 2: lam(a_p, v_q) = softmax[ l(y_a) l(y_v)^T ], a K x K matrix per clip (Fig. 2).

    Args:
        y_a, y_v: (B, K, C) encoder outputs; l(y) where l is not the identity.
        scope: "clip": the K x K entries of a clip sum to 1 (§2.2: "two-by-two") | "view": each
            row sums to 1.
        temperature: divides the similarities. The paper prints none, which is 1.
        normalize: bring y to unit length first (paper silent; SNCLR, its reference [6]). Raw
            outputs are about 17 long and saturate the softmax.
    Returns:
        lam (B, K, K), audio view p by video view q.
    """
    if scope not in ("clip", "view"):
        raise ValueError(f"scope={scope!r}: choose 'clip' or 'view'")
    if normalize:
        y_a, y_v = F.normalize(y_a, dim=-1), F.normalize(y_v, dim=-1)
    c = torch.einsum("ipc,iqc->ipq", y_a, y_v) / temperature            # (B, K, K)
    return c.softmax(2) if scope == "view" else c.flatten(1).softmax(1).view_as(c)


def soft_info_nce(y_a, y_v, z_a, z_v, eta=0.07, affinity="clip", affinity_temperature=1.0,
                  symmetric=True, normalize=True, detach=False):
    """Eq. 3: mean over clips i of sum_{p,q} lam[i,p,q] L[i,p,q].

    Under torch.distributed each process gives its own clips, and this function gathers the others.

    Args:
        y_a, y_v: (B, K, C) encoder outputs (or l(y)) of this process's clips. B is the same on
            all processes. None for affinity "none", which does not read them.
        z_a, z_v: (B, K, D) projections, unit length.
        eta: temperature of Eq. 1 ("constant", §2.1; 0.07 is GDT's).
        affinity: "clip" | "view": the scope of the softmax in Eq. 2 | "none": lam = 1/K^2, which
            is plain InfoNCE over co-augmented views (Table 1, rows 2 to 4; row 1 with K = 1) |
            "batch": the double sum of Eq. 3 read literally, where lam is a row softmax over the
            videos of all N clips, so that other clips become soft positives of weight lam.
        affinity_temperature: of the softmax in Eq. 2 (paper silent).
        symmetric: True: average of audio -> video and video -> audio | False: audio -> video
            alone, as printed.
        normalize: True: y of unit length in Eq. 2 | False: y as it is.
        detach: True: no gradient through lam | False: as printed.
    Returns:
        A scalar: the loss of this process's clips against all videos. Its mean over the processes
        is the loss of the global batch. float64 stays float64, half precision becomes float32, and
        autocast is off inside.
    """
    if affinity not in ("none", "clip", "view", "batch"):
        raise ValueError(f"affinity={affinity!r}: choose 'none', 'clip', 'view' or 'batch'")
    z_a, z_v = at_least_float32(z_a), at_least_float32(z_v)
    if affinity == "none":
        y_a = y_v = None
    elif y_a is None or y_v is None:
        raise ValueError(f"affinity={affinity!r} needs the encoder outputs y_a and y_v")
    else:
        y_a, y_v = at_least_float32(y_a), at_least_float32(y_v)
        if detach:
            y_a, y_v = y_a.detach(), y_v.detach()
    B, K, _ = z_a.shape
    rank = dist.get_rank() if distributed() else 0
    own = rank * B + torch.arange(B, device=z_a.device)                 # (B,)

    def one_way(y_q, y_k, z_q, z_k):                        # queries q against all keys k
        if affinity == "batch":
            s, log_negatives = similarities(z_q, all_gather(z_k), own, eta)   # (B, K, N, K), (B, K)
            y_k = all_gather(y_k)                                       # (N, K, C)
            if normalize:
                y_q, y_k = F.normalize(y_q, dim=-1), F.normalize(y_k, dim=-1)
            c = torch.einsum("ipc,jqc->ipjq", y_q, y_k) / affinity_temperature    # (B, K, N, K)
            lam = c.flatten(2).softmax(2).view_as(c)               # (B, K, N, K), rows sum to 1
            return (lam * nll(s, log_negatives[:, :, None, None])).sum((2, 3)).mean()
        L = info_nce(z_q, all_gather(z_k), own, eta)                    # (B, K, K)
        if affinity == "none":
            return L.mean()
        lam = cross_affinity(y_q, y_k, affinity, affinity_temperature, normalize)     # (B, K, K)
        total = K if affinity == "view" else 1                          # the sum of a clip's lam
        return (lam * L).sum((1, 2)).mean() / total

    with torch.autocast(z_a.device.type, enabled=False):
        a_to_v = one_way(y_a, y_v, z_a, z_v)
        return (a_to_v + one_way(y_v, y_a, z_v, z_a)) / 2 if symmetric else a_to_v


def at_least_float32(x):
    """float64 as it is, any other precision as float32."""
    return x if x.dtype == torch.float64 else x.float()


def distributed():
    """Whether more than one process takes part."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


class AllGather(torch.autograd.Function):
    """all_gather with its exact backward."""

    @staticmethod
    def forward(ctx, x):
        x = x.contiguous()
        out = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(out, x)
        return torch.cat(out)                                           # (W B, ...)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)              # every process's loss depends on every process's rows
        return grad.chunk(dist.get_world_size())[dist.get_rank()]       # (B, ...)


def all_gather(x):
    """Rows of all processes in rank order: (B, ...) -> (W B, ...). One process gets x itself.

    The gradient is exact: the sum over processes, of which each process takes its own rows. We do
    not use torch's own differentiable all_gather, because it is deprecated for one that torch 2.10
    lacks.
    """
    return AllGather.apply(x) if distributed() else x
