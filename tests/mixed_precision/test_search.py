"""The exact search is exact, the genetic one is near it, and both keep to what was asked."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import brecq_jax
from brecq_jax import mixed_precision, solvers
from brecq_jax.formats import Binary, Multipoint, Sparq, Ternary, Uniform
from brecq_jax.mixed_precision import Budget, Genetic, SystolicArray, exact
from brecq_jax.mixed_precision._table import Table, Term, make_table
from brecq_jax.mixed_precision.exact import cheapest

CHOICES = (Uniform(2), Uniform(4), Uniform(8))
SOLVERS = pytest.mark.parametrize("solver", [exact, Genetic()], ids=["exact", "genetic"])


def a_table(seed, decisions, options=3, sets=4):
    """Made up: losses fall with bits, two costs, one of them by pairs of decisions, interactions of both signs."""
    draw = jax.random.split(jax.random.key(seed), 5)
    losses = np.sort(np.asarray(jax.random.exponential(draw[0], (decisions, options))))[:, ::-1]
    sizes = np.asarray(jax.random.uniform(draw[1], (decisions, 1), minval=1, maxval=100)) * np.arange(2, 2 + options)
    pairs = np.asarray(jax.random.uniform(draw[2], (decisions // 2, options, options))).cumsum(1).cumsum(2)
    members = [tuple(np.asarray(jax.random.permutation(k, decisions))[: 2 + n % 2].tolist()) for n, k in enumerate(jax.random.split(draw[3], sets))]
    values = 0.3 * np.asarray(jax.random.normal(draw[4], (sets,)))
    costs = {
        "size_bits": tuple(Term((d,), own) for d, own in enumerate(sizes)),
        "latency_us": tuple(Term((2 * n, 2 * n + 1), own) for n, own in enumerate(pairs)),
    }
    names = tuple(f"d{d}" for d in range(decisions))
    return Table(names, ((None,) * options,) * decisions, tuple(losses), tuple(zip(members, values, strict=True)), costs, {"size_bits": 7.0, "latency_us": 0.0})


def limits_at(table, part, names=("size_bits", "latency_us")):
    every = np.array(list(itertools.product(*(range(len(o)) for o in table.options))))
    return {n: float(np.quantile(table.cost(n, every), part)) for n in names}, every


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("part", [0.02, 0.2, 0.6])
def test_no_choice_within_the_limits_is_better_than_the_exact_one(seed, part):
    table = a_table(seed, 6)
    limits, every = limits_at(table, part)
    within = every[np.all([table.cost(n, every) <= v for n, v in limits.items()], axis=0)]
    found = exact(table, limits)
    assert all(table.cost(n, found[None])[0] <= v for n, v in limits.items())
    assert table.loss(found[None])[0] == pytest.approx(table.loss(within).min(), rel=1e-9)


def test_options_may_differ_in_number():
    table = a_table(0, 6)
    fewer = Table(table.decisions, ((None,), *table.options[1:]), (table.losses[0][:1], *table.losses[1:]), table.interactions,
                  {"size_bits": (Term((0,), table.costs["size_bits"][0].values[:1]), *table.costs["size_bits"][1:]),
                   "latency_us": (Term((0, 1), table.costs["latency_us"][0].values[:1]), *table.costs["latency_us"][1:])}, table.constants)  # fmt: skip
    limits, every = limits_at(fewer, 0.2)
    within = every[np.all([fewer.cost(n, every) <= v for n, v in limits.items()], axis=0)]
    assert fewer.loss(exact(fewer, limits)[None])[0] == pytest.approx(fewer.loss(within).min(), rel=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_the_genetic_search_comes_near_the_optimum(seed):
    table = a_table(seed, 20)
    limits = {"size_bits": 0.7 * float(sum(t.values[-1] for t in table.costs["size_bits"]))}
    best = table.loss(exact(table, limits)[None])[0]
    found = Genetic()(table, limits, jax.random.key(seed))
    assert table.cost("size_bits", found[None])[0] <= limits["size_bits"]
    assert best - 1e-9 <= table.loss(found[None])[0] <= best + 0.1 * abs(best)
    np.testing.assert_array_equal(found, Genetic()(table, limits, jax.random.key(seed)))


@SOLVERS
def test_what_cannot_be_met_is_none(solver):
    table = a_table(0, 6)
    assert solver(table, {"size_bits": 8.0}) is None


def opposed():
    """Three decisions of two options: what is cheaper in size is slower."""
    sizes, times = [np.array([1.0, 2.1])] * 3, [np.array([2.1, 1.0])] * 3
    costs = {name: tuple(Term((d,), own) for d, own in enumerate(all_of)) for name, all_of in (("size_bits", sizes), ("latency_us", times))}
    constants = {"size_bits": 7.0, "latency_us": 0.0}
    return Table(("a", "b", "c"), ((None, None),) * 3, (np.array([1.0, 0.0]),) * 3, (), costs, constants)


@SOLVERS
def test_a_plan_that_is_cheapest_in_latency_alone_is_found(solver):
    table = opposed()
    many = dataclasses.replace(
        table, decisions=tuple(map(str, range(60))), options=table.options[:1] * 60, losses=table.losses[:1] * 60,
        costs={n: tuple(Term((d,), own[0].values) for d in range(60)) for n, own in table.costs.items()},
    )  # fmt: skip
    np.testing.assert_array_equal(solver(many, {"latency_us": 60.0}), np.ones(60))


@SOLVERS
def test_a_plan_that_just_meets_two_limits_at_once_is_found(solver):
    limits = {"size_bits": 7 + 1.0 + 2 * 2.1, "latency_us": 2.1 + 2 * 1.0}
    found = solver(opposed(), limits)
    assert found.sum() == 2 and all(opposed().cost(n, found[None])[0] <= v for n, v in limits.items())


@SOLVERS
@pytest.mark.parametrize("parts", [1.0, 1 - 1e-9])
def test_a_limit_at_the_least_cost_is_met_and_a_hair_below_it_is_not(solver, parts):
    """The programme's own tolerance is a million times wider than the hair."""
    table = a_table(1, 6)
    least = float(table.cost("size_bits", cheapest(table, "size_bits")[None])[0])
    found = solver(table, {"size_bits": parts * least})
    assert found is None if parts < 1 else table.cost("size_bits", found[None])[0] == least


@pytest.fixture(scope="module")
def measured(digits):
    found = mixed_precision.measure(
        digits.variables, digits.model.apply, digits.train_images[:64], weights=CHOICES, activations=CHOICES, preset="brecq", progress=False
    )
    return brecq_jax.trace(digits.model.apply, digits.variables, digits.train_images[:2]), found


@SOLVERS
def test_the_plan_keeps_the_budget_the_preset_and_the_rules(measured, solver):
    graph, found = measured
    budget = Budget(size_bits=150e3, bops=14e6)
    plan = brecq_jax.search(graph, found, budget, weights={"blocks_2/conv1/.*": Uniform(5)}, solver=solver)
    assert plan.size_bits <= budget.size_bits
    assert plan.weights["stem/kernel"].bits == plan.weights["head/kernel"].bits == plan.activations["head/kernel"].bits == 8
    assert plan.weights["blocks_2/conv1/kernel"].bits == 5 and plan.activations["stem/kernel"] is None
    point = mixed_precision.predict(graph, found, plan, weights={"blocks_2/conv1/.*": Uniform(5)})
    assert point.costs["size_bits"] == plan.size_bits and point.costs["bops"] <= budget.bops
    assert len({f.bits for f in plan.weights.values()}) > 2 and len({f and f.bits for f in plan.activations.values()}) > 2


def test_more_budget_is_never_worse(measured):
    graph, found = measured
    points = mixed_precision.pareto(graph, found, [Budget(size_bits=s) for s in (120e3, 150e3, 180e3, 220e3)])
    losses = [p.loss for p in points]
    assert losses == sorted(losses, reverse=True) and losses[0] > losses[-1]


def test_a_budget_below_the_cheapest_plan_is_refused_with_its_figure(measured):
    graph, found = measured
    with pytest.raises(ValueError, match=r"size_bits=1000 cannot be met: the cheapest plan has (\d+)") as error:
        brecq_jax.search(graph, found, Budget(size_bits=1000))
    cheapest = int(str(error.value).split("plan has ")[1].split(".")[0])
    assert brecq_jax.search(graph, found, Budget(size_bits=cheapest)).size_bits == cheapest


@pytest.mark.parametrize("names", [("size_bits", "latency_us"), ("latency_us", "size_bits"), ("bops", "latency_us")])
def test_figures_of_refused_budgets_can_be_written(measured, names):
    """Once for each that is below its least, and for two that cannot be met together."""
    graph, found = measured
    table = {(op.name, w, a): 0.1 / w + 1e-9 * n for n, op in enumerate(graph.ops) for w in (2, 4, 8) for a in (2, 4, 8, 32)}  # more bits are faster
    limits = dict.fromkeys(names, 1e-9)
    for name in names:
        with pytest.raises(ValueError, match=f"{name}=1e-09 cannot be met: the cheapest plan has") as error:
            brecq_jax.search(graph, found, Budget(**{name: 1e-9}), latency=table)
        limits[name] = float(str(error.value).split("plan has ")[1].split(" Write")[0].removesuffix("."))
        brecq_jax.search(graph, found, Budget(**{name: limits[name]}), latency=table)
    with pytest.raises(ValueError, match="cannot be met together, though each alone can") as error:
        brecq_jax.search(graph, found, Budget(**limits), latency=table)
    for name in names:
        figure = str(error.value).split(f"plan has {name}=")[1].split(";")[0].split(" Write")[0].removesuffix(".")
        for solver in (exact, Genetic(generations=2)):
            brecq_jax.search(graph, found, Budget(**limits | {name: float(figure)}), latency=table, solver=solver)


def test_a_front_needs_no_budgets(measured):
    graph, found = measured
    points = mixed_precision.pareto(graph, found, points=4)
    sizes, losses = [p.costs["size_bits"] for p in points], [p.loss for p in points]
    assert len(points) == 4 and sizes == sorted(sizes) and losses == sorted(losses, reverse=True)
    table = make_table(graph, found, None, None, None)
    assert sizes[0] == table.cost("size_bits", cheapest(table, "size_bits")[None])[0]
    assert losses[-1] == pytest.approx(sum(own.min() for own in table.losses))
    bops = [p.costs["bops"] for p in mixed_precision.pareto(graph, found, points=2, cost="bops")]
    assert bops[0] == table.cost("bops", cheapest(table, "bops")[None])[0] < bops[1]
    for given, words in (
        ({}, "the one or the other"), ({"budgets": [], "points": 2}, "the one or the other"), ({"points": 1}, "two points or more"),
        ({"points": 2, "cost": "size"}, "write one of size_bits"), ({"points": 2, "cost": "latency_us"}, "needs a table"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            mixed_precision.pareto(graph, found, **given)


def test_all_budgets_of_a_front_that_cannot_be_met_are_named(measured):
    graph, found = measured
    with pytest.raises(ValueError, match=r"(?s)pareto: budgets\[0\]: .*size_bits=1 cannot be met.*budgets\[2\]: .*bops=2 cannot"):
        mixed_precision.pareto(graph, found, [Budget(size_bits=1), Budget(size_bits=150e3), Budget(bops=2)])
    with pytest.raises(TypeError, match=r"a single one. Write \[Budget"):
        mixed_precision.pareto(graph, found, Budget(size_bits=150e3))


@pytest.mark.parametrize("where", ["losses", "interactions"])
@SOLVERS
def test_sensitivities_that_are_not_finite_are_refused_unless_a_rule_takes_their_place(measured, where, solver):
    graph, found = measured
    name, budget = "blocks_2/conv1/kernel", Budget(size_bits=150e3)
    members = next(own for own in found.interactions if name in own)
    other = {"losses": {name: (np.nan, 1.0, 0.0)}, "interactions": {members: np.nan}}[where]
    spoilt = dataclasses.replace(found, **{where: {**getattr(found, where), **other}})
    with pytest.raises(ValueError, match=f"{name}.*nan.*Measure with finite inputs"):
        brecq_jax.search(graph, spoilt, budget, solver=solver)
    plan = brecq_jax.search(graph, spoilt, budget, weights={name: Uniform(4)}, solver=solver)
    assert plan.weights[name].bits == 4 and plan.size_bits <= 150e3


def test_every_point_of_a_weight_is_a_product(measured):
    graph, found = measured
    costs, table = {}, SystolicArray().latency(graph)
    for points in (1, 3):
        plan = brecq_jax.make_plan(graph, Multipoint(4, points=points), Uniform(8))
        costs[points] = mixed_precision.plan_costs(graph, plan, table)
    assert costs[3]["bops"] == 3 * costs[1]["bops"]
    assert costs[3]["latency_us"] == pytest.approx(3 * costs[1]["latency_us"])
    assert costs[1]["bops"] == mixed_precision.plan_costs(graph, brecq_jax.make_plan(graph, Uniform(4), Uniform(8)))["bops"]


def test_refusals_say_what_to_write(measured):
    graph, found = measured
    for bound in (float("nan"), -1.0):
        with pytest.raises(ValueError, match=f"latency_us={bound}: write a number"):
            Budget(latency_us=bound)
    with pytest.raises(TypeError, match=r"1000000.0 is a float. Write Budget\(size_bits=1000000.0\)"):
        brecq_jax.search(graph, found, 1e6)
    with pytest.raises(ValueError, match="nothing is bounded"):
        brecq_jax.search(graph, found, Budget())
    with pytest.raises(ValueError, match="latency_us needs a table"):
        brecq_jax.search(graph, found, Budget(latency_us=1.0))
    with pytest.raises(ValueError, match="nothing is open"):
        brecq_jax.search(graph, found, Budget(bops=1e9), weights={".*": Uniform(4)}, activations={".*": None})
    other = brecq_jax.trace(lambda p, x: x @ p["w"], {"w": jnp.zeros((3, 4))}, jnp.zeros((1, 3)))
    with pytest.raises(ValueError, match="of another model"):
        brecq_jax.search(other, found, Budget(size_bits=1e6))


def test_the_plan_is_fed_to_quantize_and_to_a_file(measured, digits, tmp_path):
    graph, found = measured
    plan = brecq_jax.search(graph, found, Budget(size_bits=150e3))
    mixed_precision.save_rules(plan, tmp_path / "rules.json")
    rules = mixed_precision.load_rules(tmp_path / "rules.json")
    assert rules == plan.rules and str(brecq_jax.make_plan(graph, **rules)) == str(plan)
    q = brecq_jax.quantize(digits.variables, digits.model.apply, digits.train_images[:32], **rules, solver=solvers.nearest(), progress=False)
    assert q.report.size_bits == plan.size_bits
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match="holds no rules"):
        mixed_precision.load_rules(tmp_path / "other.json")


def test_activations_that_are_not_searched_stay_as_asked(measured):
    graph, found = measured
    activations = Sparq(4)
    of_weights = dataclasses.replace(found, activations=(), losses={n: v for n, v in found.losses.items() if n in graph.weights})
    plan = brecq_jax.search(graph, of_weights, Budget(size_bits=150e3), activations=activations)
    assert plan.activations == brecq_jax.make_plan(graph, Uniform(4), activations, "brecq").activations
    assert activations in plan.activations.values()
    ruled = brecq_jax.search(graph, found, Budget(size_bits=150e3), activations={"blocks_1/conv2.*": activations})
    assert ruled.activations["blocks_1/conv2/kernel"] == activations
    eight = brecq_jax.search(graph, of_weights, Budget(size_bits=150e3), activations=Uniform(8))
    bops = [mixed_precision.predict(graph, of_weights, p, activations=a).costs["bops"] for p, a in ((plan, activations), (eight, Uniform(8)))]
    assert bops[0] == bops[1]  # codes have eight bits, however many of them are read


def test_costs_of_a_plan_by_hand(measured):
    graph, found = measured
    macs = {"stem": 64 * 9 * 16, "blocks_0/conv1": 64 * 9 * 16 * 16, "blocks_0/conv2": 64 * 9 * 16 * 16, "blocks_1/conv1": 16 * 9 * 16 * 32,
            "blocks_1/conv2": 16 * 9 * 32 * 32, "blocks_1/shortcut": 16 * 16 * 32, "blocks_2/conv1": 16 * 9 * 32 * 32, "blocks_2/conv2": 16 * 9 * 32 * 32, "head": 320}  # fmt: skip
    reads = {"stem": 8 * 32, "head": 8 * 8, "blocks_0/conv1": 4 * 8}  # the first layer's output has 8 bits
    bops = sum(n * reads.get(name, 4 * 2) for name, n in macs.items())
    plan = brecq_jax.make_plan(graph, Uniform(4), Uniform(2), "brecq")
    assert mixed_precision.predict(graph, found, plan).costs["bops"] == bops


def test_the_systolic_array_has_the_papers_peaks():
    graph = brecq_jax.trace(lambda p, x: x @ p["w"], {"w": jnp.zeros((512, 512))}, jnp.zeros((4, 1000, 512)))
    table = SystolicArray(bandwidth_gbit=1e9).latency(graph)
    seconds = 1000 * 512 * 512 / 256e9
    for (w, a), faster in {(8, 8): 1, (8, 4): 2, (4, 8): 2, (2, 2): 16}.items():
        assert table["w", w, a] == pytest.approx(1e6 * seconds / faster)
    slow = SystolicArray(bandwidth_gbit=1e-3).latency(graph)["w", 2, 8]
    assert slow == pytest.approx((512 * 512 * 2 + 1000 * 512 * 8) / 1e6 * 1e6)


@pytest.mark.parametrize(
    ("dims", "shape", "groups", "depthwise"),
    [
        (("NHWC", "HWIO", "NHWC"), (3, 3, 1, 8), 8, True),
        (("NHWC", "HWIO", "NHWC"), (3, 3, 1, 16), 8, True),
        (("NCHW", "OIHW", "NCHW"), (8, 1, 3, 3), 8, True),
        (("NCHW", "OIHW", "NCHW"), (16, 1, 3, 3), 8, True),
        (("NHWC", "HWIO", "NHWC"), (3, 3, 4, 2), 2, False),
        (("NHWC", "HWIO", "NHWC"), (3, 3, 8, 16), 1, False),
    ],
)
def test_an_op_with_one_input_channel_a_group_uses_a_part_of_the_array(dims, shape, groups, depthwise):
    def apply_fn(params, x):
        return jax.lax.conv_general_dilated(x, params["w"], (1, 1), "SAME", dimension_numbers=dims, feature_group_count=groups)

    graph = brecq_jax.trace(apply_fn, {"w": jnp.zeros(shape)}, jnp.zeros((1, 8, 8, 8)))
    part, whole = (SystolicArray(bandwidth_gbit=1e9, depthwise_utilisation=u).latency(graph)["w", 8, 8] for u in (1 / 16, 1))
    assert part / whole == pytest.approx(16 if depthwise else 1)


def test_latency_is_a_table_of_ones_own(measured, tmp_path):
    graph, found = measured
    table = SystolicArray().latency(graph)
    mixed_precision.write_latency(table, tmp_path / "table.csv")
    assert mixed_precision.read_latency(tmp_path / "table.csv") == table
    limit = mixed_precision.predict(graph, found, brecq_jax.make_plan(graph, CHOICES[1], CHOICES[1], "brecq"), latency=table).costs["latency_us"]
    plan = brecq_jax.search(graph, found, Budget(latency_us=limit), latency=table)
    assert mixed_precision.predict(graph, found, plan, latency=table).costs["latency_us"] <= limit
    (tmp_path / "short.csv").write_text("# mine\nlayer,weight_bits,act_bits,us\nstem/kernel,8,32,1.5\n")
    with pytest.raises(ValueError, match="has no .*Add a row"):
        brecq_jax.search(graph, found, Budget(latency_us=1.0), latency=mixed_precision.read_latency(tmp_path / "short.csv"))
    head = "layer,weight_bits,act_bits,us\n"
    for text, words in (
        ("a,b\n1,2\n", "has the columns"), (f"{head}x,8,8,1\n# mine\nx,8,8,fast\n", "line 4"), (f"{head}x,8,8,nan\n", "line 2: nan µs is no time"),
        (f"{head}x,8,8,-1\n", "line 2: -1.0 µs"), (f"{head}x,8,8,1\nx,8,4,1\nx,8,8,2\n", "line 4: .* has a row already"),
    ):  # fmt: skip
        (tmp_path / "bad.csv").write_text(text)
        with pytest.raises(ValueError, match=words):
            mixed_precision.read_latency(tmp_path / "bad.csv")


@pytest.mark.parametrize(("share", "count"), [(0.2, 8), (0.5, 8), (0.8, 8), (0.4, 4), (0.3, 12), (0.6, 12)])
def test_which_weights_get_a_second_bit_is_the_best_knapsack(share, count):
    """Adaptive splitting: one bit or two for each of up to twelve weights, against all ways, 4,096 of twelve."""
    sizes = [(8, 16), (16, 24), (24, 8), (8, 32), (32, 8), (8, 8), (8, 24), (24, 16), (16, 8), (32, 24), (16, 16), (24, 24)][:count]
    params = {f"w{i}": 0.1 * jax.random.normal(jax.random.key(i), s) for i, s in enumerate(sizes)}

    def apply_fn(params, x):
        return sum(jnp.tanh(x[:, : params[n].shape[0]] @ params[n]).mean(1) for n in params)

    choices = (Binary(granularity="per_tensor"), Ternary("per_tensor"))
    graph = brecq_jax.trace(apply_fn, params, jnp.zeros((2, 32)))
    gains = np.asarray(jax.random.exponential(jax.random.key(9), (len(sizes),)))
    sensitivities = mixed_precision.Sensitivities(choices, (), {n: (float(g), 0.0) for n, g in zip(params, gains, strict=True)}, {}, None)
    one, two = (np.array([brecq_jax.make_plan(graph, {n: f}, None).size_bits for n in params]) for f in choices)
    cost, budget = two - one, share * (two - one).sum()
    best = max(gains[list(s)].sum() for r in range(count + 1) for s in itertools.combinations(range(count), r) if cost[list(s)].sum() <= budget)
    least = brecq_jax.make_plan(graph, choices[0], None).size_bits
    plan = brecq_jax.search(graph, sensitivities, Budget(size_bits=int(least + budget)))
    chosen = [isinstance(plan.weights[n], Ternary) for n in params]
    assert gains[chosen].sum() == pytest.approx(best, rel=1e-9)
