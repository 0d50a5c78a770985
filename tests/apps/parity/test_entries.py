"""What `backends=[…]` may say, and one line for what it may not."""

from pathlib import Path

import pytest

from apps.parity.entries import Entry, read_entries
from backends.errors import UserError


def test_each_form_becomes_an_entry_with_a_name() -> None:
    rules = [{"match": "*.mlp.*", "use": "a.b:Own", "step": 2}]
    entries = read_entries(
        [
            "dense",
            "some.package:Own",
            {"use": "some.package:Own", "levels": 4, "noisy": True},
            {"rules": rules},
            {"rules": rules, "default": "x:Y", "name": "mlp apart"},
            {"name": "plain", "use": "dense"},
        ]
    )
    assert entries == [
        Entry("dense", default="dense"),
        Entry("Own", default="some.package:Own"),
        Entry("Own(levels=4, noisy=True)", default={"use": "some.package:Own", "levels": 4, "noisy": True}),
        Entry("rules (Own)", tuple(rules)),
        Entry("mlp apart", tuple(rules), "x:Y"),
        Entry("plain", default={"use": "dense"}),
    ]


def test_a_rules_file_is_named_by_its_name(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("{rules: [{match: '*.mlp.*', use: 'a.b:Own'}], default: 'c:D'}")
    (_, entry) = read_entries(["dense", {"rules_file": str(file)}])
    assert entry.name == "mine.yaml"
    assert [(rule["match"], rule["use"]) for rule in entry.rules] == [("*.mlp.*", "a.b:Own")]
    assert entry.default == "c:D"


def test_equal_names_are_told_apart() -> None:
    assert [each.name for each in read_entries(["dense", "dense", "dense"])] == ["dense", "dense #2", "dense #3"]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ([], "backends has 0 entries. Expected two at least"),
        (["dense"], "backends has 1 entry. Expected two at least, the reference first: backends='[dense, optical]'"),
        (["dense", "dens"], "Unknown backend 'dens'. Did you mean 'dense'?"),
        (["dense", 3], "backends[1] is 3. Expected a backend's name"),
        (["dense", {"us": "dense"}], "backends[1] is {'us': 'dense'}. Did you mean 'use'?"),
        (["dense", {"use": "dense", "rules": []}], "backends[1] has both use and rules."),
        (["dense", {"use": "denze"}], "Did you mean 'dense'?"),
        (["dense", {"use": 4}], "backends[1] has use=4. Expected"),
        (["dense", {"rules": 4}], "backends[1] has rules=4. Expected"),
        (["dense", {"rules": [3]}], "backends[1].rules[0]: A routing rule is 3."),
        (["dense", {"rules": [], "default": 4}], "backends[1]: The default backend is 4."),
        (["dense", {"rules": [{"match": "*"}]}], "backends[1].rules[0]: Routing rule {'match': '*'} has no text for"),
        (["dense", {"rules_file": "nowhere.yaml"}], "Cannot read rules file nowhere.yaml: there is no such file."),
        (["dense", {"rules_file": 4}], "backends[1] has rules_file=4. Expected"),
        (
            ["dense", {"rules_file": "optical", "rule": 3}],
            "Unknown key in backends[1] 'rule'. Available: name, rules_file.",
        ),
        (["dense", {"rules": [{"match": "*", "use": "denze"}]}], "Did you mean 'dense'?"),
        (["dense", {"rules": [], "defalt": "dense"}], "Unknown key in backends[1] 'defalt'. Did you mean 'default'?"),
        (["dense", {"use": "dense", "name": 3}], "backends[1] has the name 3. Expected a text."),
    ],
)
def test_each_mistake_is_one_line(given: list[object], told: str) -> None:
    with pytest.raises(UserError) as raised:
        read_entries(given)
    assert told in str(raised.value)
    assert "\n" not in str(raised.value)
