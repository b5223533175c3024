"""The models of a study's cells: each kind made again by other means; and which changes have them made again."""

import types
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from torch.nn import functional

from cwfast.data import Batches
from cwfast.defense import gap_shares
from cwfast.defense.baselines import early_stopping_sweep
from cwfast.defense.specs import parse, parse_loss
from cwfast.defense.tuning import fine_tune
from cwfast.mia import Signals
from cwfast.study import grid, making, presets, sources, tables
from cwfast.study.jobs import Job, Study, _do
from cwfast.study.subject import Subject
from cwfast.training import fit_from_scratch, train_many

TINY = presets.PRESETS["tiny"]
HAMP = "hamp(gamma=0.8,alpha=0.01,reduction=batchmean)"
SETTING = replace(
    TINY.settings["digits"],
    recipe=replace(TINY.settings["digits"].recipe, epochs=6),
    losses={"none": "ce", "relaxloss": "relaxloss(alpha=0.5)", "hamp": HAMP, "dpsgd": "dpsgd:epsilon=20"},
    strengths={"relaxloss": ("relaxloss(alpha=1.0)",)},
    copied=("taylor", "gap"),
    variants=True,
    ablation=True,
    tables=("MLP",),
)
CELLS = {cell.key: cell for cell in grid.cells(SETTING)}
private = pytest.mark.skipif(find_spec("opacus") is None, reason="DP-SGD needs Opacus")


def subject_of(out, setting=SETTING, preset=TINY):
    return Subject("digits", setting, 0, preset, out)


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    return subject_of(tmp_path_factory.mktemp("cells"))


def do(subject, key, preset=TINY):
    return _do(subject, Job("digits", 0, CELLS[key], 0), preset)


def weights(fitted):
    return [dict(one.model.named_parameters()) for one in fitted]


def same(one, other):
    pairs = zip(weights(one), weights(other), strict=True)
    return all(torch.equal(a[name], b[name]) for a, b in pairs for name in a)


def reference_loss(subject, state):
    data, model = subject.task.dataset, subject.task.initial_model(0)
    model.load_state_dict(state)
    with torch.no_grad():
        return float(functional.cross_entropy(model(data.inputs[data.reference]), data.targets[data.reference]))


# -- the models


def test_stopped_by_the_reference_set_is_the_epoch_of_the_lowest_loss(subject):
    every = range(1, SETTING.recipe.epochs + 1)
    _, stopped = early_stopping_sweep(subject.task, *subject.of(0), list(every))
    found = making.fit(subject, CELLS["stopped-reference"], 0)
    for k, one in enumerate(found):
        best = min(every, key=lambda n: reference_loss(subject, stopped[n][k].model.state_dict()))
        assert same([one], [stopped[best][k]])
    assert same(making.fit(subject, CELLS["stopped-2"], 0), stopped[2])


def test_halted_is_the_epoch_of_fine_tuning_with_the_lowest_loss_or_none(subject):
    trained = subject.trained(0)
    states = [[dict(one.model.state_dict()) for one in trained]]
    models = [one.model for one in subject.trained(0)]
    ids, seeds = subject.of(0)
    train_many(models, subject.task.dataset, ids, seeds, subject.task.recipe, loss=parse_loss("relaxloss(alpha=0.5)"),
               epochs=3, on_epoch=lambda _, weights: states.append(weights()))  # fmt: skip
    assert len(states) == 4
    for k, one in enumerate(making.fit(subject, CELLS["relaxloss-halted"], 0)):
        best = min((epoch[k] for epoch in states), key=lambda state: reference_loss(subject, state))
        assert all(torch.equal(best[name], value) for name, value in one.model.state_dict().items())


def test_short_training_has_a_schedule_of_its_own(subject):
    task = replace(subject.task, recipe=replace(subject.task.recipe, epochs=2))
    found = making.fit(subject, CELLS["short-2"], 0)
    assert same(found, fit_from_scratch(task, *subject.of(0)))
    assert not same(found, making.fit(subject, CELLS["stopped-2"], 0))


@pytest.mark.parametrize("criterion", ["taylor", "gap"])
def test_random_weights_are_as_many_in_each_tensor(subject, criterion):
    chosen = making.fit(subject, CELLS[f"none-{criterion}-0.1"], 0)
    random = making.fit(subject, CELLS[f"none-random-as-{criterion}-0.1"], 0)
    for one, other in zip(chosen, random, strict=True):
        assert one.masks.counts == other.masks.counts
        assert one.masks.total > 0
        assert any(not torch.equal(one.masks[name], other.masks[name]) for name in one.masks.names)


@pytest.mark.parametrize("criterion", ["taylor", "gap"])
def test_interpolation_goes_as_far_as_the_criterions_rewinding_then_all_is_fine_tuned(subject, criterion):
    cell = CELLS[f"relaxloss-interpolated-as-{criterion}-0.1"]
    start, none = making._start(subject, cell, 0)
    rewound = making.fit(subject, replace(CELLS[f"none-{criterion}-0.1"], spec=CELLS[f"none-{criterion}-0.1"].spec
                                          + ",epochs=0"), 0)  # fmt: skip
    trained = subject.trained(0)

    def distance(a, b):
        with torch.no_grad():
            return float(sum((a[name].double() - b[name].double()).square().sum() for name in a)) ** 0.5

    for before, moved, one in zip(weights(trained), weights(start), weights(rewound), strict=True):
        assert distance(moved, before) == pytest.approx(distance(one, before), rel=1e-5)
        assert distance(moved, before) > 0
    assert all(mask.total == 0 for mask in none)
    task, (ids, seeds) = subject.task, subject.of(0)
    expected = fine_tune(
        task, [one.model for one in start], trained, ids, seeds, loss=parse_loss("relaxloss:alpha=0.5")
    )
    assert same(making.fit(subject, cell, 0), expected)


@private
def test_private_cells_keep_what_they_rewound_and_their_controls_copy_it(tmp_path):
    subject = subject_of(tmp_path, replace(SETTING, recipe=replace(SETTING.recipe, epochs=2), stops=()))
    chosen, random, moved, plain = (
        making.fit(subject, CELLS[f"dpsgd-{name}"], 0)
        for name in ("gap-0.1", "random-as-gap-0.1", "interpolated-as-gap-0.1", "tuned")
    )
    for one, other in zip(chosen, random, strict=True):
        assert one.masks.counts == other.masks.counts
        for fitted in (one, other):
            now = dict(fitted.model.named_parameters())
            assert all(torch.equal(now[n][fitted.masks[n]], fitted.initial[n][fitted.masks[n]]) for n in now)
    assert all(one.masks.total == 0 for one in [*moved, *plain])
    assert not same(moved, plain)
    assert {"dpsgd-interpolated-as-taylor-0.1", "dpsgd-halted"}.isdisjoint(CELLS)


def test_half_of_the_reference_set_is_what_gap_sees(subject):
    [cell] = [cell for cell in CELLS.values() if cell.how == "half reference"]
    found = making.fit(subject, cell, 0)[0]
    trained, (ids, _), data = subject.trained(0)[0], subject.of(0), subject.task.dataset
    sets = [Batches(data, x, 16, 0) for x in (ids[0], data.reference[::2])]
    shares = torch.cat([x.flatten() for x in gap_shares(trained.model, trained.initial, *sets).values()])
    mask = torch.cat([found.masks[name].flatten() for name, _ in trained.model.named_parameters()])
    assert mask.sum() == found.masks.total == int(0.1 * len(mask))
    # found anew, in batches of another order: shares that are nearly the last one's may change places
    assert shares[mask].min() >= shares[~mask].max() - 1e-6 * shares.max()


def test_variants_of_gap_leave_layers_out(subject):
    [cell] = [cell for cell in CELLS.values() if cell.label.startswith("weights between hidden layers")]
    found = making.fit(subject, cell, 0)[0]
    assert found.masks.counts["3.weight"] > 0
    assert all(not count for name, count in found.masks.counts.items() if not name.startswith("3."))


# -- HAMP in two views


def test_hamps_models_are_trained_once_and_seen_twice(tmp_path, monkeypatch):
    subject, fits = subject_of(tmp_path), []
    monkeypatch.setattr("cwfast.study.jobs.fit", lambda *some: fits.append(some) or making.fit(*some))
    assert do(subject, "hamp-tuned")
    assert not do(subject, "hamp-tuned")
    assert len(fits) == 1
    both = [CELLS["hamp-tuned"], CELLS["hamp-tuned-unchanged"]]
    changed, plain = (subject.folder.document(cell.key, subject.made_of(cell)) for cell in both)
    assert plain["cell"]["base"] == "hamp_plain"
    assert "HAMP, outputs unchanged" in plain["cell"]["label"]
    assert plain["test_accuracy"] == changed["test_accuracy"]
    assert plain["attacks"]["loss"]["auc"] != changed["attacks"]["loss"]["auc"]
    spec = CELLS["hamp-tuned"].spec.replace("batchmean)", "batchmean,outputs=false)")
    again = parse(spec).fit_many(subject.task, subject.of(0)[0], subject.plan.reference, subject.of(0)[1],
                                 trained=subject.trained(0))  # fmt: skip
    data = subject.task.dataset
    expected = [functional.cross_entropy(one.predict(data.inputs[data.pool]), data.targets[data.pool], reduction="none")
                for one in again]  # fmt: skip
    seen = Signals.load(subject.folder.root / "signals-hamp-tuned-unchanged-000.safetensors")
    torch.testing.assert_close(seen["loss"][:, :, 0].float(), torch.stack(expected), rtol=1e-4, atol=1e-5)


def test_a_view_that_is_missing_is_made_again(tmp_path):
    subject = subject_of(tmp_path)
    assert do(subject, "hamp-tuned")
    path = subject.folder.root / "hamp-tuned-unchanged.json"
    before = path.read_text()
    path.unlink()
    assert do(subject, "hamp-tuned")
    assert path.read_text() == before


# -- what is made again


def made(subject, keys):
    """Of some cells: whether they had to be made."""
    return [do(subject, key) for key in keys]


def test_a_changed_setting_has_its_cells_made_again_and_others_kept(tmp_path):
    keys = ["none-tuned", "relaxloss-tuned", "relaxloss-gap-0.1", "stopped-2"]
    assert made(subject_of(tmp_path), keys) == [True] * 4
    assert made(subject_of(tmp_path), keys) == [False] * 4
    other = replace(SETTING, losses={**SETTING.losses, "relaxloss": "relaxloss(alpha=0.7)"})
    cells = {cell.key: cell for cell in grid.cells(other)}
    changed = subject_of(tmp_path, other)
    assert [_do(changed, Job("digits", 0, cells[key], 0), TINY) for key in keys] == [False, True, True, False]
    assert made(subject_of(tmp_path, replace(SETTING, stops=(2, 3), rates=(0.2,))), keys[:1]) == [False]
    for data in ({"recipe": replace(SETTING.recipe, epochs=4)}, {"reference": 50}, {"test": 100}):
        assert made(subject_of(tmp_path, replace(SETTING, **data)), keys[:1]) == [True]


@pytest.mark.parametrize("change", [{"bootstrap": 30}, {"fprs": (0.2,)}])
def test_other_attacks_are_made_on_the_same_models(tmp_path, monkeypatch, change):
    before = subject_of(tmp_path)
    assert do(before, "none-tuned")
    old = before.folder.document("none-tuned", before.made_of(CELLS["none-tuned"]))
    monkeypatch.setattr("cwfast.study.jobs.fit", lambda *_: pytest.fail("trained again"))
    preset = replace(TINY, **change)
    after = subject_of(tmp_path, preset=preset)
    assert do(after, "none-tuned", preset)
    new = after.folder.document("none-tuned", after.made_of(CELLS["none-tuned"]))
    assert new["test_accuracy"] == old["test_accuracy"]
    assert new["attacks"] != old["attacks"]


def test_tables_are_made_of_their_settings(subject, monkeypatch):
    table, cell = CELLS["table-ablation-MLP"], CELLS["none-tuned"]
    other = {**SETTING.losses, "relaxloss": "relaxloss(alpha=0.7)"}
    names = [subject.made_of(table)]
    for change in ({"ablation_rate": 0.05}, {"losses": other}):
        changed = subject_of(subject.folder.root.parent.parent, replace(SETTING, **change))
        names.append(changed.made_of(table))
        assert changed.made_of(cell) == subject.made_of(cell)
    for name in ("EPOCHS", "MODELS"):
        with monkeypatch.context() as patch:
            patch.setattr(tables, name, 1)
            names.append(subject.made_of(table))
    assert len(set(names)) == 5


def test_other_code_has_all_made_again(tmp_path, monkeypatch):
    assert made(subject_of(tmp_path), ["undefended"]) == [True]
    monkeypatch.setattr("cwfast.study.subject.code", lambda: "other")
    assert made(subject_of(tmp_path), ["undefended"]) == [True]


def test_the_hash_of_the_code_sees_what_computes_and_not_what_reports(tmp_path, monkeypatch):
    names = ["defense/gap.py", "study/making.py", "study/reporting.py", "_C.cpython.so", "report/studies.py"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("1")
    monkeypatch.setattr(sources, "cwfast", types.SimpleNamespace(__file__=str(tmp_path / "__init__.py")))
    seen = []
    for name in names:
        before = sources.code.__wrapped__()
        (tmp_path / name).write_text("2")
        seen.append(sources.code.__wrapped__() != before)
    assert seen == [True, True, False, True, False]


def test_the_places_that_the_hash_is_of_exist():
    from pathlib import Path

    root = Path(sources.cwfast.__file__).parent
    assert all(list(root.glob(pattern)) for pattern in (*sources.WHERE, "_C*"))
    assert all((root / "study" / name).exists() for name in sources.STUDY)


# -- the grid


def test_every_control_copies_a_cell_of_the_same_base_and_rate():
    for setting in (SETTING, *presets.PRESETS["small"].settings.values()):
        cells = grid.cells(setting)
        copied = {
            (cell.base, cell.criterion, cell.rate, cell.strength, cell.spec)
            for cell in cells
            if cell.curve.partition(",")[0] == cell.criterion
        }
        controls = [cell for cell in cells if cell.like is not None]
        assert controls
        assert {(cell.base, cell.like, cell.rate, cell.strength, cell.spec) for cell in controls} <= copied
        assert all(cell.like in cell.curve for cell in controls)


def test_every_cell_can_be_made_and_each_view_of_hamp_has_its_own():
    assert {cell.how for cell in CELLS.values()} <= {*making.HOW, "table"}
    views = [cell for cell in CELLS.values() if cell.unchanged]
    assert len(views) == sum(cell.base == "hamp" for cell in CELLS.values()) > 0
    jobs = Study("small", ("digits",), (0,), (), None).jobs
    assert not any(job.cell.unchanged for job in jobs)


def test_other_strengths_stand_in_curves_of_their_own():
    cells = grid.cells(presets.PRESETS["small"].settings["digits"])
    for base in ("relaxloss", "hamp", "ccl"):
        mine = [cell for cell in cells if cell.base == base]
        plain = [cell.strength for cell in mine if cell.curve == "fine-tuning without rewinding"]
        assert plain[0] is None  # the preset's, the first
        assert len(plain) == 3
        for curve in ("gap", "taylor", "random as gap", "random as taylor", "interpolated as gap, then fine-tuned",
                      "interpolated as taylor, then fine-tuned"):  # fmt: skip
            others = [cell.strength for cell in mine if cell.curve == f"{curve}, other strengths"]
            assert sorted(others) == sorted(plain[1:])
        assert len([cell for cell in mine if cell.curve == "fine-tuning stopped by the reference set"]) == 3


def test_controls_at_other_strengths_come_last_and_change_no_other_cell():
    for name, setting in presets.PRESETS["small"].settings.items():
        keys = [cell.key for cell in grid.cells(setting) if cell.how != "table"]
        before = [key for key in keys if not ("-as-" in key and "-strength-" in key)]
        assert keys[: len(before)] == before
        strengths = [base for base, several in setting.strengths.items() for _ in several]
        views = len(strengths) + strengths.count("hamp")
        assert len(keys) - len(before) == 2 * len(setting.copied) * views, name
