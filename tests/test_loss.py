"""Compares Eq. 1 to 3 with NumPy copies that sum over every index, and two processes with one."""

from functools import partial
from itertools import product

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import run_two
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from loss import all_gather, double_sum, info_nce, soft_info_nce
from support.processes import rank, start

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
    """-log of Eq. 1 for audio view p of clip i and video view q of clip j."""
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


def test_info_nce_is_eq_1():
    _, _, z_a, z_v = batch(K=3)
    own = torch.tensor([3, 1])        # positions of this process's clips in the global batch
    L = info_nce(z_a[own], z_v, own, 0.07)
    for b, p, q in product(range(2), range(3), range(3)):
        i = int(own[b])
        assert abs(L[b, p, q] - eq1(z_a.numpy(), z_v.numpy(), i, p, i, q, 0.07)) < 1e-10


@pytest.mark.parametrize("affinity", OBJECTIVES)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("K", [1, 2])
def test_soft_info_nce_is_eq_3(affinity, normalize, K):
    """z may have any length, and plain InfoNCE needs no encoder outputs."""
    y_a, y_v, z_a, z_v = batch(K=K)
    n = [x.numpy() for x in (y_a, y_v, z_a, z_v)]
    a_to_v = eq3(n, 0.07, affinity, 0.5, normalize)
    v_to_a = eq3((n[1], n[0], n[3], n[2]), 0.07, affinity, 0.5, normalize)
    loss = partial(OBJECTIVES[affinity], affinity_temperature=0.5, raw_affinity=not normalize)
    long = torch.rand(5, K, 1, dtype=torch.float64) * 40 + 0.1
    assert abs(loss(y_a, y_v, long * z_a, 7 * z_v, one_way=True) - a_to_v) < 1e-10
    assert abs(loss(y_a, y_v, z_a, z_v) - (a_to_v + v_to_a) / 2) < 1e-10
    if affinity == "none":
        assert abs(loss(None, None, z_a, z_v, one_way=True) - a_to_v) < 1e-10


def test_precision():
    """The highest of the inputs counts, and half precision becomes float32."""
    y_a, y_v, z_a, z_v = batch()
    exact, mixed = (soft_info_nce(y, y_v, z_a, z_v) for y in (y_a, y_a.float()))
    assert exact.dtype == mixed.dtype == torch.float64 and abs(exact - mixed) < 1e-5
    half = batch(dtype=torch.float16)
    exact = soft_info_nce(*(x.float() for x in half))
    assert soft_info_nce(*half).dtype == torch.float32 and soft_info_nce(*half) == exact
    with torch.autocast("cpu", torch.bfloat16):   # must not round the similarities
        assert soft_info_nce(*half) == exact


def test_extreme_similarities():
    z = F.normalize(torch.eye(4)[:, None].expand(4, 2, 4), dim=2).requires_grad_()
    y = torch.rand(4, 2, 8)
    for sign in (1, -1):              # the best and the worst z; their logits are 1000 apart
        loss = soft_info_nce(y, y, z, sign * z, eta=0.001)
        loss.backward()
        assert torch.isfinite(loss) and torch.isfinite(z.grad).all()
    assert loss > 900
    z = torch.eye(2, dtype=torch.float64)[:, None]
    L = info_nce(z[:1], z.flip(0), torch.tensor([0]), 1 / 21)
    assert abs(L.item() - np.log1p(np.exp(21))) < 1e-10     # torch's own softplus gives 21


@pytest.mark.parametrize("loss", [soft_info_nce, double_sum])
def test_detach_stops_the_gradient_through_lam(loss):
    for detach in (False, True):
        y_a, y_v, z_a, z_v = (t.requires_grad_() for t in batch())
        loss(y_a, y_v, z_a, z_v, detach_affinity=detach).backward()
        assert (y_a.grad is None and y_v.grad is None) if detach else y_a.grad.abs().max() > 1e-6
        assert z_a.grad.abs().max() > 1e-6


@pytest.mark.parametrize("loss,clips,flags,sentence", [
    (soft_info_nce, 1, {"check": False}, "the global batch has 1: give it 2 or more"),
    (soft_info_nce, 5, {"affinity": "batch"}, "'batch': choose .* 'none'; double_sum sums "),
    (soft_info_nce, 5, {"eta": 0}, "temperatures must be above 0"),
    (double_sum, 5, {"affinity_temperature": -1}, "temperatures must be above 0")])
def test_bad_arguments(loss, clips, flags, sentence):
    with pytest.raises(ValueError, match=sentence):
        loss(*batch(clips), **flags)


@pytest.mark.parametrize("place,change,given", [
    (slice(0, 4), lambda x: x[:, 0, :4], "z_a (5, 4), z_v (5, 4), ly_a (5, 4), ly_v (5, 4)"),
    (slice(3, 4), lambda z: z[:4], "z_a (5, 2, 4), z_v (4, 2, 4), "),
    (slice(0, 2), lambda y: y[:, :1], "ly_a (5, 1, 6), ly_v (5, 1, 6)"),
    (slice(1, 2), lambda y: y[..., :5], "ly_a (5, 2, 6), ly_v (5, 2, 5)"),
    (slice(2, 3), lambda z: z[..., 1:], "z_a (5, 2, 3), z_v (5, 2, 4), "),
    (slice(0, 2), lambda y: None, "ly_a None, ly_v None")])
def test_shapes_that_do_not_fit(place, change, given):
    tensors = list(batch())
    tensors[place] = map(change, tensors[place])
    for loss in (soft_info_nce, double_sum):
        with pytest.raises(ValueError, match="give z_a and z_v in one shape .B, K, D.") as error:
            loss(*tensors)
        assert given in str(error.value)


@pytest.mark.parametrize("place,value,name", [(3, torch.nan, "z_v"), (0, torch.inf, "ly_a")])
def test_values_that_are_not_finite(place, value, name):
    tensors = batch()
    tensors[place][1, 1, 1] = value
    for loss in (soft_info_nce, double_sum):
        with pytest.raises(ValueError, match=f"^{name} holds NaN or infinity"):
            loss(*tensors)
        assert not loss(*tensors, check=False).isfinite()


class Net(nn.Linear):
    """A model of the form of SvaCLR for clips that are vectors: y and z are parts of its output."""

    def forward(self, v, a):
        y_v, z_v = F.linear(v, self.weight, self.bias).split([6, 4], -1)
        y_a, z_a = F.linear(a, self.weight, self.bias).split([6, 4], -1)
        return y_a.relu(), y_v.relu(), z_a, z_v


def gradients(rank, world):
    """The gradient of each objective for eight clips, of which each process has its share."""
    torch.manual_seed(0)
    net = Net(7, 10).double()
    v, a = (torch.randn(8, 2, 7, dtype=torch.float64)[rank::world] for _ in range(2))
    net = DistributedDataParallel(net) if world > 1 else net
    for objective in OBJECTIVES.values():
        net.zero_grad()
        objective(*net(v, a)).backward()
        yield torch.cat([x.grad.flatten() for x in net.parameters()])


def compare_two_processes_with_one():
    """In each of two processes."""
    start()
    nan = torch.full((4, 2, 4), torch.nan if rank() else 1)
    for z, sentence in (
            (torch.randn(4 + rank(), 2, 4), "processes have .4, 5. clips of .2, 2. views of .4, 4"),
            (torch.randn(4, 2 + rank(), 4), "processes have .4, 4. clips of .2, 3. views of .4, 4"),
            (torch.randn(4, 2, 4 + rank()), "processes have .4, 4. clips of .2, 2. views of .4, 5"),
            (torch.randn(4, 2, 4, dtype=torch.float64 if rank() else torch.float32), "64: .0, 1."),
            (nan, f"^{'z_a, z_v' if rank() else 'a tensor of another process'} holds NaN")):
        with pytest.raises(ValueError, match=sentence):     # on both, so neither waits
            soft_info_nce(None, None, z, z, affinity="none")
    found = list(gradients(rank(), 2))
    dist.barrier()                    # a process that leaves early can abort the other one
    dist.destroy_process_group()
    for two, one in zip(found, gradients(0, 1), strict=True):
        assert (two - one).norm() / one.norm() < 1e-10
    print("equal")


@pytest.mark.slow
def test_two_processes_have_the_gradient_of_one(tmp_path):
    script = "import test_loss\ntest_loss.compare_two_processes_with_one()"
    assert run_two(tmp_path, script) == ["equal", "equal"]


def test_no_process_group_is_needed():
    """conftest.py has made one of a single process, which changes nothing."""
    x = batch()
    assert dist.get_world_size() == 1 and all_gather(x[0]) is x[0]
    grouped = [objective(*x) for objective in OBJECTIVES.values()]
    dist.destroy_process_group()
    assert grouped == [objective(*x) for objective in OBJECTIVES.values()]
