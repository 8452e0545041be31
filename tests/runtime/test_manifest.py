"""Tests runtime/manifest.py: what is written is read back, and whatever else a file holds gives one line."""

import copy
import json
import pathlib
import shutil

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tocom.runtime.errors import InputError
from tocom.runtime.manifest import FORMAT, Family, InputSpec


def refusal(call, *args) -> str:
    """The message of the InputError that the call raises; it is one line."""
    with pytest.raises(InputError) as caught:
        call(*args)
    message = str(caught.value)
    assert message.isprintable(), message
    return message


@pytest.fixture
def written(family_folder):
    """The parsed manifest, and a function that reads the family after it was replaced by something else."""

    def read(content):
        raw = content if isinstance(content, bytes) else json.dumps(content).encode()
        (family_folder / "family.json").write_bytes(raw)
        return Family.read(family_folder)

    return json.loads((family_folder / "family.json").read_text()), read


def test_what_is_written_is_read_back(family_folder):
    family = Family.read(family_folder)
    assert [entry.degree for entry in family.engines] == [2, 8]
    assert family.engines[0].tokens == (65, 63, 61) and family.class_names == ("red", "green", "blue")
    before = (family_folder / "family.json").read_bytes()
    family.write(family_folder)
    assert (family_folder / "family.json").read_bytes() == before
    assert Family.read(family_folder) == family
    assert before.endswith(b"}\n") and b'\n "model": "tiny"' in before


def test_the_order_of_hashes_does_not_change_the_bytes(family_folder, entry_of):
    family = Family.read(family_folder)
    hashes = {"a.bin": "0" * 64, **family.entry(2).sha256}
    written = []
    for order in (hashes, dict(reversed(hashes.items()))):
        written.append(family.with_entry(entry_of(family_folder, 2, sha256=order)).write(family_folder).read_bytes())
    assert written[0] == written[1]


def test_entry_lists_the_degrees_there_are(family_folder):
    family = Family.read(family_folder)
    assert family.entry(8).degree == 8
    message = refusal(family.entry, 4)
    assert "(2, 8)" in message and "got 4" in message and "tocom compile --degrees 4" in message


def test_with_entry_replaces_the_same_degree_and_keeps_the_order(family_folder, entry_of):
    family = Family.read(family_folder)
    changed = family.with_entry(entry_of(family_folder, 2, precision="int8"))
    assert [(entry.degree, entry.precision) for entry in changed.engines] == [(2, "int8"), (8, "fp32")]
    assert family.entry(2).precision == "fp32"
    shutil.copytree(family_folder / "r02", family_folder / "r00")
    assert [entry.degree for entry in changed.with_entry(entry_of(family_folder, 0)).engines] == [0, 2, 8]


def test_unknown_keys_are_ignored(written):
    data, read = written
    expected = read(data)
    data["from_the_future"] = data["input"]["antialias"] = data["engines"][0]["colour"] = {"deep": [1]}
    assert read(data) == expected


def test_a_byte_order_mark_is_no_obstacle(written):
    data, read = written
    assert read(b"\xef\xbb\xbf" + json.dumps(data).encode()) == read(data)


def test_no_manifest_says_how_to_make_one(tmp_path):
    for folder in (tmp_path, tmp_path / "missing", "\0"):
        assert refusal(Family.read, folder)
    assert "tocom compile" in refusal(Family.read, tmp_path)


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"", "not JSON"),
        (b'{"format": 1,', "not JSON"),
        (b"\x80\x04binary\x00", "cannot be read"),
        (b"[1]", "the file must be an object"),
        (b"null", "the file must be an object"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b'{"format": NaN}', "NaN is not a JSON number"),
        (b'{"format": ' + b"1" * 5000 + b"}", "not JSON"),
        (b"{}", "the key format is missing"),
        (b'{"format": 2}', f"format must be {FORMAT} or lower"),
        (b'{"format": true}', "format must be a whole number"),
        (b'{"format": 0}', "format must be a whole number, 1 or more, got 0"),
    ],
)
def test_a_broken_file_gives_one_line(written, raw, words):
    message = refusal(written[1], raw)
    assert words in message and "family.json" in message


def leaves(value, path=()):
    """The path of every key in a parsed manifest, except below the free-form ones."""
    children = value.items() if isinstance(value, dict) else enumerate(value)
    for key, child in children:
        if isinstance(key, str):
            yield (*path, key)
        if isinstance(child, (dict, list)) and key not in ("validation", "accuracy", "latency_ms", "sha256", "build"):
            yield from leaves(child, (*path, key))


def test_every_missing_key_is_named(written):
    data, read = written
    later = {
        ("schedule",),
        ("reduction",),
        *(("engines", 1, name) for name in ("native", "pays", "build", "machine")),
    }  # older files lack them
    paths = [path for path in leaves(data) if path[:2] != ("engines", 0) and path not in later]
    assert len(paths) == 9 + 6 + 14
    for path in paths:
        broken = copy.deepcopy(data)
        parent = broken
        for key in path[:-1]:
            parent = parent[key]
        del parent[path[-1]]
        name = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path)[1:]
        assert f"the key {name} is missing" in refusal(read, broken)


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("model",), 3, "model must be a string, got 3"),
        (("model",), "\ud800", "model must be a string without lone surrogates"),
        (("classes",), 0, "classes must be a whole number, 1 or more"),
        (("classes",), 3.0, "classes must be a whole number"),
        (("class_names",), ["a"], "class_names must hold 3 names, got 1"),
        (("class_names",), ["a", "b", 3], "class_names[2] must be a string"),
        (("checkpoint_sha256",), "abc", "checkpoint_sha256 must be a sha256"),
        (("engines",), {}, "engines must be a list"),
        (("engines", 1), 5, "engines[1] must be an object"),
        (("engines", 1, "tokens"), "197", "engines[1].tokens must be a list, got '197'"),
        (("engines", 1, "tokens"), [65, True, 61], "engines[1].tokens[1] must be a whole number"),
        (("engines", 1, "tokens"), [65, 63], "engines[1].tokens must be one number more than the schedule's 2"),
        (("engines", 1, "degree"), -1, "engines[1].degree must be a whole number, 0 or more, got -1"),
        (("engines", 1, "degree"), 2, "degree 2 twice"),
        (("engines", 1, "gmacs"), 10**400, "engines[1].gmacs must be a finite number"),
        (("engines", 1, "sha256"), {"r08/model.onnx": "xyz"}, "engines[1].sha256.r08/model.onnx must be a sha256"),
        (("engines", 1, "sha256"), {}, "engines[1].onnx must be one of the files in engines[1].sha256"),
        (("engines", 1, "latency_ms"), {"1": {"p50": "fast"}}, "engines[1].latency_ms.1.p50 must be a number"),
        (("engines", 1, "accuracy"), {"top1": "high"}, "engines[1].accuracy.top1 must be a number"),
        (("engines", 1, "validation"), [], "engines[1].validation must be an object"),
        (("input", "size"), [1, 8, 8], "input.size must be [3, height, width]"),
        (("input", "size"), [3, 8], "input.size must be [3, height, width]"),
        (("input", "size"), [3, 8, 10**9], "input.size must be sides of 1 to"),
        (("input", "mean"), [0.5], "input.mean must be three numbers"),
        (("input", "std"), [1, 1, 0], "input.std must be three numbers above 0"),
        (("input", "interpolation"), "random", "input.interpolation must be one of nearest"),
        (("input", "crop_pct"), 0, "input.crop_pct must be a number in"),
        (("input", "crop_mode"), "corner", "input.crop_mode must be one of"),
    ],
)
def test_a_wrong_value_is_named_with_its_place(written, path, value, words):
    data, read = written
    parent = data
    for key in path[:-1]:
        parent = parent[key]
    parent[path[-1]] = value
    assert words in refusal(read, data)


def test_numbers_out_of_range_are_refused_wherever_they_hide(written):
    data, read = written
    raw = json.dumps(data).replace("1e-06", "1e999").encode()
    assert "engines[0].validation.max_abs must be a finite number" in refusal(read, raw)


@pytest.mark.parametrize(
    "path",
    ["/x", "../model.onnx", "r08/../../x", "r08\\x", "C:/x", "//host/x", "", ".", "a/./b", "a//b", "a/", "a\nb"],
)
def test_paths_that_could_lead_out_are_refused(written, path):
    data, read = written
    for key in ("onnx", "engine"):
        broken = copy.deepcopy(data)
        broken["engines"][1][key] = path
        assert f"engines[1].{key} must be a relative path inside the folder" in refusal(read, broken)
    data["engines"][1]["sha256"][path] = "0" * 64
    assert "a key of engines[1].sha256 must be a relative path" in refusal(read, data)


def test_links_that_lead_out_are_refused(family_folder, tmp_path):
    family = Family.read(family_folder)
    target = shutil.move(family_folder / "r08/model.onnx", tmp_path / "elsewhere.onnx")
    pathlib.Path(family_folder / "r08/model.onnx").symlink_to(target)
    assert "a link out of it" in refusal(Family.read, family_folder)
    assert "a link out of it" in refusal(family.check_files, family_folder, family.entry(8))
    pathlib.Path(family_folder / "r08/model.onnx").unlink()
    pathlib.Path(family_folder / "r08/model.onnx").symlink_to("model.onnx")
    assert "degree 8: r08/model.onnx" in refusal(Family.read, family_folder)


def test_a_link_within_the_folder_and_a_linked_folder_are_fine(family_folder, tmp_path):
    shutil.move(family_folder / "r08/model.onnx", family_folder / "shared.onnx")
    pathlib.Path(family_folder / "r08/model.onnx").symlink_to("../shared.onnx")
    pathlib.Path(tmp_path / "link").symlink_to(family_folder)
    family = Family.read(tmp_path / "link")
    family.check_files(tmp_path / "link", family.entry(8))


def test_check_files_names_the_file_that_is_not_the_compiled_one(family_folder):
    family = Family.read(family_folder)
    for entry in family.engines:
        family.check_files(family_folder, entry)
    with pathlib.Path(family_folder / "r08/model.onnx").open("ab") as file:
        file.write(b"x")
    family.check_files(family_folder, family.entry(2))
    message = refusal(family.check_files, family_folder, family.entry(8))
    assert "r08/model.onnx" in message and "it has changed" in message and "tocom compile --degrees 8" in message
    pathlib.Path(family_folder / "r08/model.onnx").unlink()
    assert "r08/model.onnx is missing" in refusal(family.check_files, family_folder, family.entry(8))


def test_write_refuses_what_read_would_refuse_and_keeps_the_old_file(family_folder, entry_of):
    family, before = Family.read(family_folder), (family_folder / "family.json").read_bytes()
    for changes in ({"validation": {"max_abs": float("nan")}}, {"tokens": (65,)}, {"engine": "../x"}):
        assert refusal(family.with_entry(entry_of(family_folder, 2, **changes)).write, family_folder)
    assert (family_folder / "family.json").read_bytes() == before


def test_input_spec_is_checked_when_made_in_python_too():
    with pytest.raises(InputError, match="input.interpolation must be one of"):
        InputSpec((3, 8, 8), (0, 0, 0), (1, 1, 1), "random", 1.0, "center")
    with pytest.raises(InputError, match="input.crop_pct must be a number in .* no larger than the sides"):
        InputSpec((3, 1, 8), (0, 0, 0), (1, 1, 1), "bicubic", 1.15, "center")
    spec = InputSpec([3, 8, 8], [0, 0, 0], [1, 1, 1], "bicubic", 1.0, "squash")
    assert InputSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6) | st.sampled_from(["../x", "/x"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
FUZZ = settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@FUZZ
@given(edits=st.lists(st.tuples(st.integers(min_value=0), st.none() | JSON_VALUES), min_size=1, max_size=3))
def test_any_deleted_or_replaced_value_gives_a_family_or_one_line(written, edits):
    data, read = copy.deepcopy(written[0]), written[1]
    for number, replacement in edits:
        places = list(_places(data))
        if not places:
            break
        parent, key = places[number % len(places)]
        if replacement is None and number % 2:
            del parent[key]
        else:
            parent[key] = replacement
    _family_or_one_line(read, data)


@FUZZ
@given(
    edits=st.lists(st.tuples(st.integers(min_value=0), st.integers(0, 255)), min_size=1, max_size=4),
    cut=st.booleans(),
)
def test_any_changed_byte_gives_a_family_or_one_line(written, edits, cut):
    raw = bytearray(json.dumps(written[0]).encode())
    for place, byte in edits:
        raw[place % len(raw)] = byte
    _family_or_one_line(written[1], bytes(raw[: edits[0][0] % len(raw)] if cut else raw))


def _places(value):
    if isinstance(value, (dict, list)):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from _places(value[key])


def _family_or_one_line(read, content):
    try:
        family = read(content)
    except InputError as error:
        assert str(error).isprintable() and len(str(error)) < 1000
    else:
        assert isinstance(family, Family)
