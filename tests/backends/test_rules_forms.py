"""What the three forms of a rules file mean, checked on a model: which layer goes where."""

from pathlib import Path
from typing import Any

import pytest

from backends import rules_forms
from backends.errors import UserError
from backends.routing import Plan, layers_of, plan
from backends.rules_file import read_rules
from tests.backends.tiny_transformer import SCALED, TinyTransformer

LAYERS = layers_of(TinyTransformer(depth=2), sequence_length=16)
PROJECTIONS = [f"layers.{i}.self_attn.{name}_proj" for i in range(2) for name in "qkvo"]
PRODUCTS = [f"layers.{i}.self_attn" for i in range(2)]
MLPS = [f"layers.{i}.mlp.{name}_proj" for i in range(2) for name in ("up", "down")]


@pytest.fixture(autouse=True)
def _stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The forms that name no backend mean a small one here, whose option is `levels`."""
    monkeypatch.setattr(rules_forms, "BACKEND", SCALED)
    monkeypatch.chdir(tmp_path)


def routed(name: str) -> Plan:
    file = read_rules(name)
    return plan(LAYERS, file.rules, file.default or "dense")


def levels(content: str, name: str = "rules.yaml") -> dict[str, int | None]:
    """Layer → the levels it computes with, None for dense."""
    Path(name).write_text(content)
    planned = routed(name)
    return {layer: planned.backend_of(layer).options().get("levels") for layer in LAYERS}


def expected(**groups: int) -> dict[str, int | None]:
    """The levels of groups of layers; what is in none is dense."""
    members = {"projections": PROJECTIONS, "products": PRODUCTS, "mlps": MLPS, "head": ["lm_head"]}
    chosen = {layer: number for group, number in groups.items() for layer in members[group]}
    return {layer: chosen.get(layer) for layer in LAYERS}


def refused(content: str, name: str = "rules.yaml") -> str:
    Path(name).write_text(content)
    with pytest.raises(UserError) as caught:
        routed(name)
    message = str(caught.value)
    assert "\n" not in message
    assert name in message
    return message


# ---- our own ---------------------------------------------------------------------------------------------------

RULE = f"{{match: '*.mlp.*', use: '{SCALED}', levels: 8}}"


@pytest.mark.parametrize("content", [f"- {RULE}\n", f"rules:\n- {RULE}\n", f"[{RULE}]"])
def test_a_list_of_rules_alone_or_under_a_key(content: str) -> None:
    assert levels(content) == expected(mlps=8)


def test_the_default_is_a_name_or_has_options() -> None:
    assert levels(f"rules: [{RULE}]\ndefault: {SCALED}\n") == expected(mlps=8, projections=256, products=256)
    default = f"default: {{use: '{SCALED}', levels: 4}}\nrules: "
    assert levels(f"{default}[{RULE}]") == expected(mlps=8, projections=4, products=4)
    assert levels(f"{default}[]") == expected(mlps=4, projections=4, products=4)


def test_a_file_that_says_nothing_of_the_default_leaves_it_open() -> None:
    Path("rules.yaml").write_text(f"- {RULE}")
    assert read_rules("rules.yaml").default is None


def test_the_same_rules_in_toml() -> None:
    text = f'[[rules]]\nmatch = "*.mlp.*"\nuse = "{SCALED}"\nlevels = 8\n'
    assert levels(text, "rules.toml") == expected(mlps=8)


# ---- options by layer name -------------------------------------------------------------------------------------

USERS = r"""
use_regex: true
layer_name_to_config:
  'layers\.[0-9]+\.self_attn': {levels: 4}
  'layers.[0-9]+\.self_attn\.(q|k|v|o)_proj': {levels: 8}
  'layers\.[0-9]+\.mlp\.(gate|up|down)_proj': {levels: 16}
  "lm_head": null
"""


def test_options_by_regular_expression() -> None:
    assert levels(USERS) == expected(products=4, projections=8, mlps=16)


def test_the_first_match_in_file_order_counts_and_the_whole_name_has_to_match() -> None:
    first = "use_regex: true\nlayer_name_to_config:\n  '.*_proj': {levels: 4}\n"
    assert levels(f"{first}  '.*': {{levels: 8}}") == expected(projections=4, mlps=4, products=8)
    assert "this one matches a part" in refused("use_regex: true\nlayer_name_to_config: {'mlp': null}")


def test_null_leaves_a_layer_alone() -> None:
    text = r"""{use_regex: true, layer_name_to_config: {'.*\.mlp\..*': null, default: {levels: 4}}}"""
    assert levels(text) == expected(projections=4, products=4)


def test_the_default_never_takes_the_head_but_a_key_of_its_own_does() -> None:
    rest = expected(products=4, projections=4, mlps=4)
    assert levels("layer_name_to_config: {default: {levels: 4}}") == rest
    assert levels("layer_name_to_config: {default: {levels: 4}, lm_head: {levels: 8}}") == rest | {"lm_head": 8}


def test_without_use_regex_names_are_exact() -> None:
    for text in ("", "use_regex: false\n"):
        taken = levels(f"{text}layer_name_to_config:\n  layers.0.self_attn: {{levels: 4}}\n  default: null\n")
        assert [layer for layer, number in taken.items() if number] == ["layers.0.self_attn"]


def test_an_empty_mapping_is_the_backend_as_it_is() -> None:
    assert levels("layer_name_to_config: {default: {}}") == expected(products=256, projections=256, mlps=256)


# ---- one set of options for attention, one for linears ---------------------------------------------------------

GLOBAL = "use_lora = false\n[attention]\nlevels = 4\n[fc]\nlevels = 8\n[lora]\nr = 32\nlora_alpha = 16\n"


def test_attention_means_all_products_and_fc_all_linears_but_the_head() -> None:
    assert levels(GLOBAL, "rules.toml") == expected(products=4, projections=8, mlps=8)
    assert levels("[fc]\nlevels = 8\n", "rules.toml") == expected(projections=8, mlps=8)
    assert levels("[attention]\n", "rules.toml") == expected(products=256)


@pytest.mark.parametrize(
    ("content", "lora"),
    [
        (GLOBAL, {"r": 0}),
        (GLOBAL.replace("false", "true"), {"r": 32, "alpha": 16.0}),
        ("use_lora = true\n[fc]\n[lora]\nr = 4\n", {"r": 4}),
        ("[fc]\n", {"r": 0}),
    ],
)
def test_its_lora_part_is_told(content: str, lora: dict[str, Any]) -> None:
    Path("rules.toml").write_text(content)
    assert read_rules("rules.toml").lora == lora


def test_the_other_forms_say_nothing_of_lora() -> None:
    for content in (f"- {RULE}", USERS):
        Path("rules.yaml").write_text(content)
        assert read_rules("rules.yaml").lora is None


# ---- mistakes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("rules: 3", "Key 'rules' of rules file rules.yaml is 3. Expected a list of {match: PATTERN, use: BACKEND"),
        ("[]", "Key 'rules' of rules file rules.yaml is []. Expected a list of {match: PATTERN, use: BACKEND"),
        ("{rules: [], defualt: dense}", "Unknown key of rules file rules.yaml 'defualt'. Did you mean 'default'?"),
        ("[3]", "Rule 0 of rules file rules.yaml: A routing rule is 3. Expected {match"),
        ("[{match: a}]", "has no text for 'use'"),
        ("[{match: a, use: dens}]", "Rule 0 of rules file rules.yaml: Unknown backend 'dens'. Did you mean 'dense'?"),
        (
            "[{match: a, use: dense, syntax: rex}]",
            "Rule 0 of rules file rules.yaml: Routing rule 'a' of rules.yaml has",
        ),
        ("{rules: [], default: {levels: 3}}", "Key 'default' of rules file rules.yaml: The default backend is"),
        ("{rules: [], default: dens}", "Key 'default' of rules file rules.yaml: Unknown backend 'dens'."),
        (f"{{rules: [], default: {{use: '{SCALED}', level: 3}}}}", "The default backend of rules.yaml: Unknown"),
        ("{use_regexp: true, layer_name_to_config: {a: null}}", "'use_regexp'. Did you mean 'use_regex'?"),
        ("{use_regex: 'yes', layer_name_to_config: {a: null}}", "Key 'use_regex' of rules file rules.yaml is 'yes'."),
        ("layer_name_to_config: {}", "Key 'layer_name_to_config' of rules file rules.yaml is {}. Expected layer"),
        ("layer_name_to_config: {3: null}", "Key '3' of rules file rules.yaml is no text. Expected a layer name."),
        ("layer_name_to_config: {a: 3}", "Key 'a' of rules file rules.yaml is 3. Expected a mapping of options, or "),
        ("layer_name_to_config: {a: {use: dense}}", "has the key 'use'. Expected options of the "),
        ("{use_regex: true, layer_name_to_config: {'*.mlp': null}}", "'*.mlp' of rules.yaml is no regular expression"),
        ("layer_name_to_config: {lm_head: {level: 3}}", "Routing rule 'lm_head' of rules.yaml: Unknown "),
        ("layer_name_to_config: {lm_head: {levels: 1}}", "Routing rule 'lm_head' of rules.yaml: levels is 1. Expected"),
        (
            r"{use_regex: true, layer_name_to_config: {'layers\..*\.self_atn': {}}}",
            "matches no layer. Near it: layers.{0-1}.self_attn",
        ),
        (
            r"{use_regex: true, layer_name_to_config: {'.*': {}, '.*\.self_attn': null}}",
            r"Routing rule '.*\.self_attn' of rules.yaml → dense takes no layer: '.*' before it took all 2",
        ),
    ],
)
def test_a_mistake_names_the_file_and_the_key(content: str, message: str) -> None:
    assert message in refused(content)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("use_lroa = true\n[fc]\n", "Unknown key of rules file rules.toml 'use_lroa'. Did you mean 'use_lora'?"),
        ("use_lora = 1\n[fc]\n", "Key 'use_lora' of rules file rules.toml is 1. Expected true or false."),
        ("fc = 3\n", "Section [fc] of rules file rules.toml is 3. Expected a mapping of options."),
        ("lora = 3\n[fc]\n", "Section [lora] of rules file rules.toml is 3. Expected a mapping of options."),
        ("[fc]\n[lora]\nrank = 3\n", "Unknown key of [lora] in rules file rules.toml 'rank'. Available: r, lora_alpha"),
        (
            "[fc]\n[lora]\nr = 0\n",
            "Section [lora] of rules file rules.toml has r = 0. Expected a whole number above 0.",
        ),
        ("[fc]\n[lora]\nr = 4.0\n", "has r = 4.0. Expected a whole number above 0."),
        ("[fc]\n[lora]\nlora_alpha = inf\n", "has lora_alpha = inf. Expected a number above 0."),
        ("use_lora = true\n[fc]\n", "has no r, but use_lora is true. Expected a rank, for example r = 32."),
        ("[fc]\nonly = 3\n", "Section [fc] of rules file rules.toml has the key 'only'. Expected options of the "),
        ("[attention]\nlevel = 3\n", "Routing rule '*' of rules.toml [attention]: Unknown "),
        ("[fc]\nlevels = '3'\n", "Routing rule '*' of rules.toml [fc]: Option 'levels' of backend"),
    ],
)
def test_a_mistake_names_the_file_and_the_section(content: str, message: str) -> None:
    assert message in refused(content, "rules.toml")
