"""Defenses by name: what a text becomes, and what refused texts say."""

import inspect

import pytest

from cwfast.defense import CWRF, DPSGD, EarlyStopping, HAMPOutputs, PlainTraining, parse, parse_loss
from cwfast.defense.losses import HAMP, ConvexConcave, RelaxLoss
from cwfast.defense.specs import DEFENSES, table
from cwfast.training import cross_entropy


def test_texts_become_defenses():
    assert parse("none").loss is cross_entropy
    plain = parse("relaxloss:alpha=0.5,upper=1")
    assert isinstance(plain, PlainTraining)
    assert vars(plain.loss) == {"alpha": 0.5, "upper": 1}
    assert isinstance(plain.loss, RelaxLoss)
    assert vars(parse(" CCL:form=ccql, alpha=0.3 ").loss) == vars(ConvexConcave("ccql", 0.3))
    assert vars(parse("ccl(form=ccql,alpha=0.3)").loss) == vars(ConvexConcave("ccql", 0.3))
    stopped = parse("early_stopping:epochs=3")
    assert isinstance(stopped, EarlyStopping)
    assert stopped.epochs == 3


def test_every_name_with_its_published_settings_can_be_had():
    needed = {"relaxloss": "alpha=1", "early-stopping": "epochs=3", "dpsgd": "epsilon=8", "cwrf": "rate=0.1"}
    for name in DEFENSES:
        if name == "dpsgd":
            pytest.importorskip("opacus")
        assert parse(f"{name}:{needed.get(name, '')}").fit_many


def test_losses_in_parentheses_have_their_own_options():
    found = parse("cwrf:rate=0.01,loss=relaxloss(alpha=0.5,upper=0.9),criterion=gap,update=false,steps=none")
    assert isinstance(found, CWRF)
    assert (found.rate, found.criterion, vars(found.loss)) == (0.01, "gap", {"alpha": 0.5, "upper": 0.9})
    assert parse("cwrf:rate=0.01,loss=ce").loss is cross_entropy
    assert vars(parse_loss("ccl:beta=0.05")) == vars(parse_loss("ccl(beta=0.05)")) == vars(ConvexConcave(beta=0.05))


def test_hamp_modifies_outputs_wherever_it_is_used():
    for text, inner in (("hamp:gamma=0.9", PlainTraining), ("cwrf:rate=0.1,loss=hamp(gamma=0.9)", CWRF)):
        found = parse(text)
        assert isinstance(found, HAMPOutputs)
        assert isinstance(found.defense, inner)
        assert vars(found.defense.loss) == vars(HAMP(0.9))
    for text, inner in (("hamp:outputs=false", PlainTraining), ("cwrf:rate=0.1,loss=hamp(outputs=false)", CWRF)):
        assert isinstance(parse(text), inner)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"must be one of none, relaxloss, hamp, .*; got ''"),
        ("magic:a=1", r"must be one of none, relaxloss, hamp, .*; got 'magic'"),
        ("relaxloss", r"must be given alpha, as in relaxloss:alpha=\.\.\.; its options: alpha, upper=1\.0"),
        ("relaxloss:beta=1", r"relaxloss has the options alpha, upper=1\.0; got 'beta'"),
        ("relaxloss:alpha", r"option=value, with commas between; got 'alpha'"),
        ("relaxloss:alpha=", r"option=value, with commas between; got 'alpha='"),
        ("relaxloss:alpha=1,alpha=2", "given once; got alpha twice"),
        ("relaxloss:alpha=-1", "relaxloss: alpha must be at least 0"),
        ("relaxloss:alpha=much", "relaxloss's alpha must be a number; got much"),
        ("relaxloss:alpha=true", "relaxloss's alpha must be a number; got true"),
        ("relaxloss:alpha=none", "relaxloss's alpha must be a number; got none"),
        ("early-stopping:epochs=2.5", r"early-stopping's epochs must be a whole number; got 2\.5"),
        ("relaxloss(alpha=1", r"must be written name, name:option=value,\.\.\. or .*; got 'relaxloss\(alpha=1'"),
        ("relaxloss alpha=1", "must be written name, "),
        ("cwrf:rate=0.1,loss=relaxloss(alpha=1", "parentheses must be closed"),
        ("cwrf:rate=0.1,loss=relaxloss)", "parentheses must be closed"),
        ("cwrf:rate=0.1,loss=relaxloss", "must be given alpha"),
        ("ccl:form=3", "ccl's form must be a word; got 3"),
        ("cwrf:rate=0.1,update=1", "cwrf's update must be true or false; got 1"),
        ("cwrf:rate=0.1,private=relaxloss(alpha=1)", "must be one of dpsgd; got 'relaxloss'"),
        ("dpsgd:epsilon=1,recipe=3", "dpsgd has the options epsilon=none, .*; got 'recipe'"),
        ("hamp:outputs=3", "outputs must be true or false; got 3"),
        ("cwrf:rate=0.1,loss=cwrf(rate=1)", "must be one of relaxloss, hamp, .*; got 'cwrf'"),
        ("cwrf:rate=0.1,loss=relaxloss(alpha=-1)", "relaxloss: alpha must be at least 0"),
    ],
)
def test_refused_texts_say_what_there_is(text, message):
    with pytest.raises(ValueError, match=message):
        parse(text)


def test_the_table_lists_each_name_with_the_defaults_of_its_arguments():
    rows = {name: options for name, options, _ in table()}
    assert set(rows) <= set(DEFENSES)
    assert rows["hamp"] == "gamma=0.95, alpha=0.001, reduction=mean, outputs=true"
    assert [part.split("=")[0] for part in rows["cwrf"].split(", ")] == list(inspect.signature(CWRF).parameters)
    assert "recipe" in inspect.signature(DPSGD).parameters
    assert "recipe" not in rows["dpsgd"]


def test_word_lists_and_private_fine_tuning_have_values_of_their_own():
    found = parse("cwrf:rate=0.1,exclude=*.bias+norm*,private=dpsgd(noise_multiplier=1,delta=1e-4),scope=layer")
    assert (found.variant.exclude, found.variant.scope) == (["*.bias", "norm*"], "layer")
    assert isinstance(found.private, DPSGD)
    assert (found.private.noise_multiplier, found.private.delta) == (1, 1e-4)
    assert parse("cwrf:rate=0.1,exclude=none").variant.exclude is None
