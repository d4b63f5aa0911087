"""Compares Eq. 1 to 3 with NumPy copies that sum over every index, and two processes with one."""

import re
from functools import partial
from itertools import product

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import ROOT, run

from loss import all_gather, cross_affinity, double_sum, info_nce, soft_info_nce

# The objectives by the name of --affinity.
OBJECTIVES = {name: partial(soft_info_nce, affinity=name) for name in ("none", "clip", "view")}
OBJECTIVES["batch"] = double_sum


def batch(N=5, K=2, C=6, D=4, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    normal = lambda width: torch.randn(N, K, width, generator=g, dtype=torch.float64)
    y_a, y_v = (normal(C).relu() * 2 for _ in range(2))
    z_a, z_v = (F.normalize(normal(D), dim=2) for _ in range(2))
    return tuple(x.to(dtype) for x in (y_a, y_v, z_a, z_v))


def eq1(z_a, z_v, i, p, j, q, eta):
    """-log of Eq. 1 for audio view p of clip i and video view q of clip j.

    The negatives are the views of all clips but i.
    """
    e = lambda n, r: np.exp(z_a[i, p] @ z_v[n, r] / eta)
    others = sum(e(n, r) for n in range(len(z_v)) if n != i for r in range(z_v.shape[1]))
    return -np.log(e(j, q) / (e(j, q) + others))


def eq3(tensors, eta, affinity, temperature, normalize):
    """Eq. 3, audio -> video, one term at a time. tensors: y_a, y_v, z_a, z_v."""
    y_a, y_v, z_a, z_v = tensors
    N, K, _ = z_a.shape
    unit = (lambda y: y / np.linalg.norm(y)) if normalize else (lambda y: y)
    w = lambda i, p, j, q: np.exp(unit(y_a[i, p]) @ unit(y_v[j, q]) / temperature)
    total = 0
    for i, p in product(range(N), range(K)):
        for j, q in product(range(N), range(K)):
            if affinity == "batch":
                lam = w(i, p, j, q) / sum(w(i, p, n, r) for n in range(N) for r in range(K)) / K
            elif j != i:
                continue
            elif affinity == "none":
                lam = 1 / K ** 2
            elif affinity == "view":
                lam = w(i, p, i, q) / sum(w(i, p, i, r) for r in range(K)) / K
            else:
                lam = w(i, p, i, q) / sum(w(i, o, i, r) for o in range(K) for r in range(K))
            total += lam * eq1(z_a, z_v, i, p, j, q, eta) / N
    return total


@pytest.mark.parametrize("K", [1, 2, 3])
def test_info_nce_is_eq_1(K):
    _, _, z_a, z_v = batch(K=K)
    own = torch.tensor([3, 1])        # positions of this process's clips in the global batch
    L = info_nce(z_a[own], z_v, own, 0.07)
    for b, p, q in product(range(2), range(K), range(K)):
        i = int(own[b])
        assert abs(L[b, p, q] - eq1(z_a.numpy(), z_v.numpy(), i, p, i, q, 0.07)) < 1e-10


def test_a_large_loss_is_exact():
    """With s = 0 and one negative of 21 the loss is log(1 + e^21); torch's softplus gives 21."""
    z_a = torch.tensor([[[1.0, 0.0]]], dtype=torch.float64)
    z_v = torch.tensor([[[0.0, 1.0]], [[1.0, 0.0]]], dtype=torch.float64)
    L = info_nce(z_a, z_v, torch.tensor([0]), 1 / 21)
    assert abs(L.item() - np.log1p(np.exp(21))) < 1e-10


@pytest.mark.parametrize("scope", ["clip", "view"])
@pytest.mark.parametrize("normalize", [True, False])
def test_cross_affinity_is_eq_2(scope, normalize):
    y_a, y_v, _, _ = batch()
    lam = cross_affinity(y_a, y_v, scope, 0.3, not normalize)
    a, v = y_a.numpy(), y_v.numpy()
    if normalize:
        a, v = (y / np.linalg.norm(y, axis=2, keepdims=True) for y in (a, v))
    for i in range(len(lam)):
        e = np.exp(a[i] @ v[i].T / 0.3)
        expected = e / (e.sum() if scope == "clip" else e.sum(1, keepdims=True))
        assert np.abs(lam[i].numpy() - expected).max() < 1e-10


@pytest.mark.parametrize("affinity", OBJECTIVES)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("K", [1, 2])
def test_soft_info_nce_is_eq_3(affinity, normalize, K):
    y_a, y_v, z_a, z_v = batch(K=K)
    n = [x.numpy() for x in (y_a, y_v, z_a, z_v)]
    a_to_v = eq3(n, 0.07, affinity, 0.5, normalize)
    v_to_a = eq3((n[1], n[0], n[3], n[2]), 0.07, affinity, 0.5, normalize)
    loss = partial(OBJECTIVES[affinity], affinity_temperature=0.5, raw_affinity=not normalize)
    assert abs(loss(y_a, y_v, z_a, z_v, one_way=True) - a_to_v) < 1e-10
    assert abs(loss(y_a, y_v, z_a, z_v) - (a_to_v + v_to_a) / 2) < 1e-10


@pytest.mark.parametrize("affinity", OBJECTIVES)
def test_z_may_have_any_length(affinity):
    y_a, y_v, z_a, z_v = batch()
    stretch = torch.rand(5, 2, 1, dtype=torch.float64) * 40 + 0.1
    expected = OBJECTIVES[affinity](y_a, y_v, z_a, z_v)
    assert abs(OBJECTIVES[affinity](y_a, y_v, stretch * z_a, 7 * z_v) - expected) < 1e-10


def test_one_view_is_cross_entropy():
    """Table 1, row 1: without co-augmentation Eq. 3 is the usual InfoNCE for every affinity."""
    y_a, y_v, z_a, z_v = batch(K=1)
    expected = F.cross_entropy(z_a[:, 0] @ z_v[:, 0].T / 0.07, torch.arange(5))
    for affinity in ("none", "clip", "view"):
        loss = soft_info_nce(y_a, y_v, z_a, z_v, affinity=affinity, one_way=True)
        assert abs(loss - expected) < 1e-12


def test_uniform_affinity_is_co_augmented_info_nce():
    x = batch()
    plain = soft_info_nce(*x, affinity="none")
    for affinity in ("clip", "view"):
        assert abs(soft_info_nce(*x, affinity=affinity, affinity_temperature=1e12) - plain) < 1e-10
        assert abs(soft_info_nce(*x, affinity=affinity, affinity_temperature=0.1) - plain) > 1e-3


def test_precision():
    assert soft_info_nce(*batch()).dtype == torch.float64
    for dtype in (torch.float16, torch.bfloat16):
        x = batch(dtype=dtype)
        assert soft_info_nce(*x).dtype == torch.float32
        assert soft_info_nce(*x) == soft_info_nce(*(t.float() for t in x))
        with torch.autocast("cpu", torch.bfloat16):   # must not round the similarities
            assert soft_info_nce(*(t.float() for t in x)) == soft_info_nce(*x)


def test_far_apart_similarities_stay_finite():
    z = F.normalize(torch.eye(4)[:, None].expand(4, 2, 4), dim=2).requires_grad_()
    y = torch.rand(4, 2, 8)
    for sign in (1, -1):              # the best and the worst z; their logits are 1000 apart
        loss = soft_info_nce(y, y, z, sign * z, eta=0.001)
        loss.backward()
        assert torch.isfinite(loss) and torch.isfinite(z.grad).all()
    assert loss > 900


@pytest.mark.parametrize("loss", [soft_info_nce, double_sum])
def test_detach_stops_the_gradient_through_lam(loss):
    for detach in (False, True):
        y_a, y_v, z_a, z_v = (t.requires_grad_() for t in batch())
        loss(y_a, y_v, z_a, z_v, detach_affinity=detach).backward()
        assert (y_a.grad is None and y_v.grad is None) if detach else y_a.grad.abs().max() > 1e-6
        assert z_a.grad.abs().max() > 1e-6


def test_bad_arguments():
    y_a, y_v, z_a, z_v = batch(N=1)
    with pytest.raises(ValueError, match="the global batch has 1: give it 2 or more"):
        soft_info_nce(y_a, y_v, z_a, z_v)
    with pytest.raises(ValueError, match="'pairs'"):
        soft_info_nce(*batch(), affinity="pairs")
    with pytest.raises(ValueError, match="'batch'"):
        cross_affinity(y_a, y_v, scope="batch")


def without_view(x):
    return x[:, 0]


def with_nan(x):
    return x.masked_fill(torch.arange(x.numel()).view_as(x) == 7, torch.nan)


@pytest.mark.parametrize("loss", [soft_info_nce, double_sum])
@pytest.mark.parametrize("changes,sentence", [
    ([None, None, without_view, without_view],
     "z_a (5, 4), z_v (5, 4), ly_a (5, 2, 6), ly_v (5, 2, 6): give each three axes, (clips, views, "
     "width); for one view that is z_a[:, None]"),
    ([None, None, None, lambda z: z[:4]], "z_a (5, 2, 4), z_v (4, 2, 4), ly_a (5, 2, 6), ly_v "
     "(5, 2, 6): sound and video must have the same clips and views, the first two axes"),
    ([lambda y: y[:, :1], None, None, None], "ly_a (5, 1, 6), ly_v (5, 2, 6): sound and video must "
     "have the same clips and views"),
    ([None, lambda y: y[..., :5], None, None], "ly_a (5, 2, 6), ly_v (5, 2, 5): l(y) of sound and "
     "video differ in width: Eq. 2 multiplies them, so use an l that maps both encoder outputs to "
     "one width"),
    ([None, None, lambda z: z[..., 1:], None], "z_a (5, 2, 3), z_v (5, 2, 4), ly_a (5, 2, 6), ly_v "
     "(5, 2, 6): z of sound and video differ in width: end both projectors in the same width"),
    ([None, None, None, with_nan], "z_v (5, 2, 4) holds NaN or infinity: look for the step before "
     "it that diverged"),
    ([lambda y: y * torch.inf, None, None, None], "ly_a (5, 2, 6) holds NaN or infinity"),
    ([None, lambda y: None, None, None], "ly_v missing: give the projections z and l(y), the "
     "encoder outputs under l; only soft_info_nce with affinity='none' works without l(y)"),
    ([None, None, lambda z: None, lambda z: None], "z_a and z_v missing: ")])
def test_bad_tensors_get_a_sentence(loss, changes, sentence):
    tensors = [change(x) if change else x for change, x in zip(changes, batch())]
    with pytest.raises(ValueError, match=re.escape(sentence)):
        loss(*tensors)


@pytest.mark.parametrize("flags", [{"eta": 0}, {"affinity_temperature": -1}])
@pytest.mark.parametrize("loss", [soft_info_nce, double_sum])
def test_temperatures_are_above_0(loss, flags):
    with pytest.raises(ValueError, match="temperatures must be above 0"):
        loss(*batch(), **flags)


def test_mixed_precisions_become_the_highest():
    y_a, y_v, z_a, z_v = batch()
    loss = soft_info_nce(y_a.float(), y_v, z_a, z_v.float())
    assert loss.dtype == torch.float64 and abs(loss - soft_info_nce(y_a, y_v, z_a, z_v)) < 1e-5


def test_nan_passes_if_it_is_not_asked_for():
    y_a, y_v, z_a, z_v = batch()
    assert soft_info_nce(y_a, y_v, with_nan(z_a), z_v, check=False).isnan()


WORKER = '''
import sys
import torch, torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
sys.path.insert(0, sys.argv[2])
from loss import double_sum, soft_info_nce

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.f, self.g, self.h = nn.Linear(7, 6), nn.Linear(7, 6), nn.Linear(6, 4)
    def forward(self, v, a):
        y_v, y_a = self.f(v).relu(), self.g(a).relu()
        return y_a, y_v, self.h(y_a), self.h(y_v)

world = int(sys.argv[3])
if world > 1:
    dist.init_process_group("gloo")
    z = torch.randn(4 + dist.get_rank(), 2, 4)
    try:
        soft_info_nce(None, None, z, z, affinity="none")
    except ValueError as error:
        assert str(error).startswith("the processes have [4, 5] clips: give all the same number")
    else:
        raise AssertionError("4 and 5 clips were taken")
rank = dist.get_rank() if world > 1 else 0
torch.manual_seed(0)
net, v, a = Net(), torch.randn(8, 2, 7), torch.randn(8, 2, 7)
B = 8 // world
net = DistributedDataParallel(net) if world > 1 else net
grads = {}
for affinity in ("none", "clip", "view", "batch"):
    net.zero_grad()
    outputs = net(v[rank * B:][:B], a[rank * B:][:B])
    loss = (double_sum(*outputs) if affinity == "batch" else
            soft_info_nce(*outputs, affinity=affinity))
    loss.backward()
    grads[affinity] = torch.cat([p.grad.flatten() for p in net.parameters()])
if rank == 0:
    torch.save(grads, sys.argv[1])
if world > 1:
    dist.barrier()                    # a process that leaves early can abort the other one
    dist.destroy_process_group()
'''


@pytest.mark.slow
def test_two_processes_have_the_gradient_of_one(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    for world in (1, 2):
        run(tmp_path / f"{world}.pt", ROOT, world, script=script, processes=world, fresh=True)
    one, two = (torch.load(tmp_path / f"{world}.pt") for world in (1, 2))
    for affinity in OBJECTIVES:
        error = (two[affinity] - one[affinity]).norm() / one[affinity].norm()
        print(f"{affinity}: relative error of the gradient {error:.1e}")
        assert error <= 1e-6


def test_plain_info_nce_needs_no_encoder_outputs():
    results = []
    for given in (True, False):
        y_a, y_v, z_a, z_v = (x.requires_grad_() for x in batch())
        loss = soft_info_nce(*(y_a, y_v) if given else (None, None), z_a, z_v, affinity="none")
        loss.backward()
        results.append((loss.detach(), z_a.grad, z_v.grad))
    assert all(one.equal(other) for one, other in zip(*results))


def test_a_group_of_one_process_changes_nothing():
    """conftest.py has made such a group. Without it loss, gradients and rows are the same."""
    assert dist.is_initialized() and dist.get_world_size() == 1
    results = []
    for grouped in (True, False):
        if not grouped:
            dist.destroy_process_group()
        assert dist.is_initialized() == grouped
        for affinity, objective in OBJECTIVES.items():
            x = [tensor.requires_grad_() for tensor in batch()]
            assert all_gather(x[0]) is x[0]
            loss = objective(*x)
            loss.backward()
            grads = [tensor.grad for tensor in x if tensor.grad is not None]
            assert len(grads) == (2 if affinity == "none" else 4)
            results.append([loss.detach(), *grads])
    for one, other in zip(results[:4], results[4:]):
        assert all(x.equal(y) for x, y in zip(one, other, strict=True))
