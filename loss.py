"""SvaCLR's objective: Eq. 1 (§2.1), Eq. 2 (§2.2) and Eq. 3 (§2.3) of arXiv 2309.13942.

    import torch
    from loss import soft_info_nce
    ly_a, ly_v = torch.randn(2, 8, 2, 512)      # l(y) of sound and video: 8 clips, 2 views, C = 512
    z_a, z_v = torch.randn(2, 8, 2, 256)        # their projections, D = 256
    loss = soft_info_nce(ly_a, ly_v, z_a, z_v)

This file needs torch alone, and the MIT licence of this unofficial implementation beside a copy.
GDT (github.com/facebookresearch/GDT) and SNCLR (github.com/ChongjianGE/SNCLR) are the paper's
references [17] and [6].
Symbols: B clips on this process, W processes, N = W B clips in the global batch; K views per
modality (view 0 at speed 1, view 1 at a drawn speed); C width of l(y), D projection width. Views
keep an axis of their own, so that no index arithmetic decides which row belongs to which clip:

                     clip j = i             clip j != i
    video views q    0         1            0      1
    audio p = 0      L[i,0,0]  L[i,0,1]     -      -      A "-" is a negative of every L[i,p,q] in
    audio p = 1      L[i,1,0]  L[i,1,1]     -      -      its row. The clip's own other view is
                                                          neither positive nor negative.
"""

import torch
import torch.distributed as dist
from torch.nn.functional import normalize, softplus


def similarities(z_a, z_v, own, eta):
    """Both parts of the fraction in Eq. 1: the similarities s and the log of the negatives' sum.

        s[i,p,j,q] = z_a[i,p] . z_v[j,q] / eta
        log_negatives[i,p] = log sum_{j != i} sum_{q'} exp(s[i,p,j,q'])

    The negatives are both speeds of all other clips: 2(N-1) of them for K = 2.
    """
    N = len(z_v)
    if N < 2:
        raise ValueError(f"Eq. 1 contrasts a clip with other clips, but the global batch has {N}: "
                         "give it 2 or more")
    s = torch.einsum("ipd,jqd->ipjq", z_a, z_v) / eta                   # (B, K, N, K)
    same = own[:, None] == torch.arange(N, device=own.device)           # (B, N), True where j = i
    others = s.masked_fill(same[:, None, :, None], -torch.inf)          # (B, K, N, K)
    return s, others.flatten(2).logsumexp(2)                            # (B, K, N, K), (B, K)


def nll(s, log_negatives):
    """-log( exp(s) / (exp(s) + exp(log_negatives)) ) = log(1 + exp(log_negatives - s))."""
    return softplus(log_negatives - s, threshold=50)    # log(1 + e^x) = x from there on


def info_nce(z_a, z_v, own, eta):
    """Eq. 1, with the -log that InfoNCE means:

        L[i,p,q] = -log( exp(s[i,p,i,q])
                         / ( exp(s[i,p,i,q]) + sum_{j != i} sum_{q'} exp(s[i,p,j,q']) ) )

    Args:
        z_a: (B, K, D) audio projections of this process's clips, of unit length.
        z_v: (N, K, D) video projections of the global batch, of unit length. (For video -> audio
            the modalities change places.)
        own: (B,) int64, the position of each local clip among the N.
        eta: temperature, > 0.
    Returns:
        L (B, K, K), audio view p by video view q. Raises ValueError if N < 2.

    It does not normalise, gather, or check shapes and values: that is what
    soft_info_nce(None, None, z_a, z_v, affinity="none") does.
    """
    s, log_negatives = similarities(z_a, z_v, own, eta)                 # (B, K, N, K), (B, K)
    s_own = s[torch.arange(len(own), device=own.device), :, own]        # (B, K, K), s[i,p,i,q]
    return nll(s_own, log_negatives[:, :, None])                        # (B, K, K)


def cross_affinity(ly_a, ly_v, scope="clip", temperature=1.0, raw=False):
    """Eq. 2: lam(a_p, v_q) = softmax[ l(y_a) l(y_v)^T ], a K x K matrix per clip (Fig. 2).

    Args:
        ly_a, ly_v: (B, K, C) l(y) of the encoder outputs y, which is y for the identity mapping.
        scope: "clip": the K x K entries of a clip sum to 1 (§2.2) | "view": each row sums to 1.
        temperature: divides the similarities. The paper prints none, which is 1.
        raw: False: bring l(y) to unit length first (paper silent; SNCLR, its reference [6]) |
            True: take it as it is. Raw outputs are about 17 long and saturate the softmax.
    Returns:
        lam (B, K, K), audio view p by video view q. soft_info_nce alone checks the arguments.
    """
    if scope not in ("clip", "view"):
        raise ValueError(f"the affinity's scope is {scope!r}: choose 'clip' or 'view', or in "
                         "soft_info_nce 'none'; double_sum sums over the pairs of all clips")
    if not raw:
        ly_a, ly_v = normalize(ly_a, dim=-1), normalize(ly_v, dim=-1)
    c = torch.einsum("ipc,iqc->ipq", ly_a, ly_v) / temperature          # (B, K, K)
    return c.softmax(2) if scope == "view" else c.flatten(1).softmax(1).view_as(c)


def soft_info_nce(ly_a, ly_v, z_a, z_v, *, eta=0.07, affinity="clip", affinity_temperature=1.0,
                  raw_affinity=False, detach_affinity=False, one_way=False, check=True):
    """Eq. 3, with (i, j) read as the pairs of views of one clip. It is printed as:

        L(f, g, A, V) = E_{(tau_1, tau_2) ~ p(T)} [ 1/N^2 sum_{i=1..N} sum_{j=1..N}
                            lam(a_i^tau_1, v_j^tau_2) L(g(a_i^tau_1), f(v_j^tau_2)) ]

    Read literally, i and j are clips: that is `double_sum`. Here they are the K x K pairs of views
    (p, q) of one clip (§2.2), over which lam sums to 1, so that a mean over the N clips replaces
    1/N^2:

        loss = mean over i of sum_{p,q} lam[i,p,q] L[i,p,q]

    Under torch.distributed each process gives its own clips, and this function gathers the others,
    so all processes of the default group have to call it, with the same keyword arguments. If all z
    are equally near, the loss is log(1 + K(N - 1)). Random z of width D give about 1 / (2 D eta^2)
    more where D is large, 0.4 for D = 256, and far more where it is small.

    Args:
        ly_a, ly_v: (B, K, C) l(y) of this process's clips, see `cross_affinity`. If the encoders
            differ in width, l maps them to one. All processes have the same B (drop_last=True of a
            DataLoader), and give the same arguments. None for affinity "none".
        z_a, z_v: (B, K, D) projections, of any length: they are brought to unit length here. Clips
            come first: torch.stack([view_0, view_1], dim=1). Three mistakes go unnoticed:
            (K, B, D), z in place of y, and other clips or views in one of the four.
        eta: temperature of Eq. 1 ("constant", §2.1; 0.07 is GDT's).
        affinity: "clip" | "view": the scope of the softmax in Eq. 2 | "none": lam = 1/K^2, which
            is plain InfoNCE over co-augmented views (Table 1, rows 2 to 4; row 1 with K = 1).
        affinity_temperature, raw_affinity: of Eq. 2, see `cross_affinity`.
        detach_affinity: True: no gradient through lam | False: as printed.
        one_way: True: audio -> video alone, as printed | False: the mean of both directions.
        check: True: refuse NaN, infinity, and processes with different shapes. A GPU then
            stops for a moment at each call | False: the caller sees to that.
    Returns:
        A scalar: the loss of this process's clips against all videos. The mean of the losses, and
        of the gradients of the weights as DDP takes it, over the processes are those of the global
        batch. float64 stays float64, half precision becomes float32, and autocast is off inside.
        Raises ValueError if an argument does not fit: on all processes if it is found by `check`,
        otherwise on its own process alone.
    """
    needed = (z_a, z_v) if affinity == "none" else (z_a, z_v, ly_a, ly_v)
    z_a, z_v, *ly = check_inputs(needed, eta, affinity_temperature, check)
    if detach_affinity:
        ly = [x.detach() for x in ly]

    def contrast(z_1, z_2, ly_1=None, ly_2=None):       # modality 1 against modality 2
        L = info_nce(z_1, all_gather(z_2), positions(z_1), eta)         # (B, K, K), Eq. 1
        if affinity == "none":
            return L.mean()
        lam = cross_affinity(ly_1, ly_2, affinity, affinity_temperature, raw_affinity)  # (B, K, K)
        lam = lam / lam.shape[1] if affinity == "view" else lam         # sums to 1 over p and q
        return (lam * L).sum((1, 2)).mean()

    with torch.autocast(z_a.device.type, enabled=False):
        a_to_v = contrast(z_a, z_v, *ly)
        return a_to_v if one_way else (a_to_v + contrast(z_v, z_a, *reversed(ly))) / 2


def double_sum(ly_a, ly_v, z_a, z_v, *, eta=0.07, affinity_temperature=1.0, raw_affinity=False,
               detach_affinity=False, one_way=False, check=True):
    """Eq. 3 with its double sum read literally: j runs over all N clips.

        loss = mean over i and p of sum_{j,q} lam[i,p,j,q] L[i,p,j,q]

    lam is a softmax over the videos of all clips. So 1/N replaces the printed 1/N^2, and other
    clips become soft positives. In an older version training with it stayed near chance, which
    l(y) of unit length may have caused. The arguments are those of `soft_info_nce`.
    """
    z_a, z_v, ly_a, ly_v = check_inputs((z_a, z_v, ly_a, ly_v), eta, affinity_temperature, check)
    if not raw_affinity:
        ly_a, ly_v = normalize(ly_a, dim=-1), normalize(ly_v, dim=-1)
    if detach_affinity:
        ly_a, ly_v = ly_a.detach(), ly_v.detach()

    def contrast(z_1, z_2, ly_1, ly_2):                 # modality 1 against modality 2
        s, log_negatives = similarities(z_1, all_gather(z_2), positions(z_1), eta)
        L = nll(s, log_negatives[:, :, None, None])                     # (B, K, N, K)
        c = torch.einsum("ipc,jqc->ipjq", ly_1, all_gather(ly_2)) / affinity_temperature
        lam = c.flatten(2).softmax(2).view_as(c)                        # (B, K, N, K)
        return (lam * L).sum((2, 3)).mean()

    with torch.autocast(z_a.device.type, enabled=False):
        a_to_v = contrast(z_a, z_v, ly_a, ly_v)
        return a_to_v if one_way else (a_to_v + contrast(z_v, z_a, ly_v, ly_a)) / 2


def check_inputs(tensors, eta, affinity_temperature, check):
    """Check z_a, z_v and, where they are needed, ly_a, ly_v; return them in one precision.

    z gets unit length. Raises ValueError if a shape or a temperature does not fit: on the own
    process alone, for which the others then wait. With `check` all processes raise it if a value is
    NaN or infinite, or if the shapes of z or precisions differ between processes.
    """
    if not (0 < eta < float("inf") and 0 < affinity_temperature < float("inf")):
        raise ValueError(f"eta={eta}, affinity_temperature={affinity_temperature}: temperatures "
                         "must be above 0, and finite")
    names = ("z_a", "z_v", "ly_a", "ly_v")[:len(tensors)]
    shapes = [tuple(x.shape) if torch.is_tensor(x) else None for x in tensors]
    audio, video = shapes[::2], shapes[1::2]
    if (None in shapes or audio != video or {len(x) for x in shapes} != {3}
            or len({x[:2] for x in shapes}) > 1 or 0 in audio[0]
            or not all(x.is_floating_point() for x in tensors)):
        given = ", ".join(f"{name} {x.dtype} {shape}" if shape is not None else
                          f"{name} {type(x).__name__}"
                          for name, x, shape in zip(names, tensors, shapes))
        raise ValueError(f"{given}: give z_a and z_v in one shape (B, K, D), and ly_a and ly_v in "
                         "one shape (B, K, C), float tensors with the same B clips and K views "
                         "(one view is z[:, None]); only soft_info_nce with affinity='none' works "
                         "without ly")
    if check:
        diverged = [name for name, x in zip(names, tensors) if not x.isfinite().all()]
        double = any(x.dtype == torch.float64 for x in tensors)
        state = torch.tensor([[*shapes[0], shapes[-1][2], double, len(diverged)]],
                             device=tensors[0].device)
        B, K, D, C, double, faults = all_gather(state).T.tolist()       # all raise, so none waits
        if len({*zip(B, K, D, C, double)}) > 1:
            raise ValueError(f"the processes have {B} clips of {K} views, z of {D} numbers and ly "
                             f"of {C} (float64: {double}): give all the same (drop_last=True of a "
                             "DataLoader)")
        if any(faults):
            raise ValueError(f"{', '.join(diverged) or 'a tensor of another process'} holds NaN or "
                             "infinity: look for the step before it that diverged")
    dtype = torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32
    tensors = [x.to(dtype) for x in tensors]
    return *(normalize(z, dim=-1) for z in tensors[:2]), *tensors[2:]


def positions(z):
    """The positions (B,) of this process's clips in the global batch."""
    B, rank = len(z), dist.get_rank() if distributed() else 0
    return rank * B + torch.arange(B, device=z.device)


def distributed():
    """Whether more than one process takes part."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


class AllGather(torch.autograd.Function):
    """all_gather with its exact backward."""

    @staticmethod
    def forward(ctx, x):
        x = x.contiguous()
        rows = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(rows, x)            # all_gather_into_tensor warns in torch 2.14
        return torch.cat(rows)                                          # (W B, ...)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)              # every process's loss depends on every process's rows
        return grad.chunk(dist.get_world_size())[dist.get_rank()]       # (B, ...)


def all_gather(x):
    """Rows of all processes in rank order: (B, ...) -> (W B, ...). One process gets x itself.

    The gradient is exact: the sum over processes, of which each process takes its own rows.
    """
    return AllGather.apply(x) if distributed() else x
