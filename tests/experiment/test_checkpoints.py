"""Checkpoints as files: written, read back, damaged, foreign, of another run."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import states
import tiny
from orbax.checkpoint import v1 as ocp

from kfqn_optax.experiment import checkpoints, leaves, sums
from kfqn_optax.experiment.atomic import replace
from kfqn_optax.experiment.checkpoints import Checkpoints, Position
from kfqn_optax.experiment.fingerprint import fingerprint
from kfqn_optax.experiment.steps import TrainState
from kfqn_optax.experiment.workdir import METRICS, RunError

STEPS = 4
CONFIG = tiny.config()


def _state(seed=0):
    """Every kind of leaf: matrices, whole numbers, bfloat16, scalars, random keys, nothing."""
    rng = np.random.default_rng(seed)
    return TrainState(
        params={"kernel": jnp.asarray(rng.normal(size=(30, 20)), jnp.float32)},
        opt_state={
            "half": jnp.asarray(rng.normal(size=5), jnp.bfloat16),
            "count": jnp.asarray(seed, jnp.int32),
            "empty": jnp.zeros((0, 3)),
            "nan": jnp.asarray([np.nan, -0.0, np.inf]),
        },
        model_state={"key": jax.random.key(seed), "keys": jax.random.split(jax.random.key(9), 2)},
    )


def _facts(state=None, config=CONFIG):
    return fingerprint(config, tiny.dataset(), _state() if state is None else state)


def _position(step=6):
    epoch, batch = divmod(step, STEPS)
    history = [
        dict.fromkeys(METRICS, 1 / 3) | {"epoch": n, "step": 4 * n} for n in range(epoch + 1)
    ]
    return Position(epoch, batch, 0.1 + 0.2, [0.1 * n for n in range(batch)], history)


def _open(workdir, facts=None, config=CONFIG):
    return Checkpoints(workdir, _facts() if facts is None else facts, config)


def _newest(workdir, facts=None, template=None):
    """Returns what is found, and what is said of what is passed over."""
    said = []
    with _open(workdir, facts) as opened:
        return opened.newest(_state(1) if template is None else template, STEPS, said.append), said


def _assert_same(expected, found):
    assert jax.tree.structure(expected) == jax.tree.structure(found)
    assert leaves.describe(expected) == leaves.describe(found)
    states.assert_same(leaves.to_arrays(expected), leaves.to_arrays(found))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A workdir with the checkpoints of steps 5 and 6."""
    workdir = tmp_path_factory.mktemp("written")
    with _open(workdir) as opened:
        for step in (5, 6):
            opened.save(_state(step), _position(step), STEPS)
    return workdir


@pytest.fixture
def workdir(written, tmp_path):
    """A copy of it."""
    subprocess.run(["cp", "-r", str(written / "checkpoints"), str(tmp_path)], check=True)
    return tmp_path


def _files(workdir, name="00000006"):
    folder = workdir / "checkpoints" / name
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_what_is_saved_comes_back(workdir):
    (state, position), said = _newest(workdir)
    _assert_same(_state(6), state)
    assert position == _position(6)
    assert said == []


def test_the_sums_are_those_of_sha256sum(workdir):
    command = ["sha256sum", "--check", "--quiet", "--strict", "00000006.sha256"]
    subprocess.run(command, cwd=workdir / "checkpoints", check=True)


def test_no_checkpoints(tmp_path):
    assert _newest(tmp_path) == (None, [])
    assert (tmp_path / "checkpoints").is_dir()


def test_so_many_are_kept(tmp_path):
    config = tiny.config(keep_checkpoints=2)
    with _open(tmp_path, config=config) as opened:
        for step in (1, 2, 3, 5):
            opened.save(_state(step), _position(step), STEPS)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["00000003", "00000003.sha256", "00000005", "00000005.sha256"]


# Damage: the newest checkpoint is told of, and the one before is used.


def _cut(path):
    path.write_bytes(path.read_bytes()[:-1] if path.stat().st_size else b"x")


def _flip(path):
    content = bytearray(path.read_bytes() or b"x")
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _link(path):
    moved = path.with_name("elsewhere")
    path.rename(moved)
    path.symlink_to(moved)


@pytest.mark.parametrize("hurt", [_cut, _flip, os.remove, _link])
def test_any_file_that_is_not_as_written(workdir, hurt, tmp_path_factory):
    for number in range(len(_files(workdir))):
        copy = tmp_path_factory.mktemp("copy")
        subprocess.run(["cp", "-r", str(workdir / "checkpoints"), str(copy)], check=True)
        path = _files(copy)[number]
        hurt(path)
        (state, position), said = _newest(copy)
        assert position.epoch * STEPS + position.batch == 5, path
        _assert_same(_state(5), state)
        (sentence,) = said
        assert "checkpoints/00000006 " in sentence
        assert path.name in sentence


@pytest.mark.parametrize("tail", [b"", b"garbage\n", b"\xff\xfe\0"])
def test_cut_sums(workdir, tail):
    path = workdir / "checkpoints" / "00000006.sha256"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2] + tail)
    (_, position), (sentence,) = _newest(workdir)
    assert position == _position(5)
    # by where the cut lies: behind a line, in a sum, in a name
    words = "that 00000006.sha256 does not name", "is not as it was", "lacks 00000006"
    assert any(word in sentence for word in words)


def test_sums_that_are_a_link_or_much_too_long(workdir):
    path = workdir / "checkpoints" / "00000006.sha256"
    _link(path)
    assert "00000006.sha256 is no file of sums" in _newest(workdir)[1][0]
    path.unlink()
    path.write_bytes(b"\n" * (2 << 20))
    assert "00000006.sha256 is no file of sums" in _newest(workdir)[1][0]


def test_a_file_more(workdir):
    (workdir / "checkpoints" / "00000006" / "more.pkl").write_bytes(b"")
    assert "a file '00000006/more.pkl' that 00000006.sha256 does not name" in _newest(workdir)[1][0]


def test_a_folder_that_is_a_link(workdir):
    path = workdir / "checkpoints" / "00000006"
    path.rename(workdir / "outside")
    path.symlink_to(workdir / "outside")
    assert "is a link, not a folder" in _newest(workdir)[1][0]
    with _open(workdir) as opened:
        opened.save(_state(6), _position(6), STEPS)
    assert len(list((workdir / "outside").rglob("*"))) > 5, "only the link is removed"


def test_more_bytes_than_the_state_can_have(workdir, monkeypatch):
    monkeypatch.setattr(checkpoints, "_LONGEST", 10_000)
    with open(_files(workdir)[0], "ab") as file:
        file.truncate(1 << 30)
    (_, position), (sentence,) = _newest(workdir, template=_state())
    assert position == _position(5)
    assert "bytes, more than the" in sentence


def test_what_a_kill_leaves_is_passed_over_and_removed(workdir):
    """A kill while Orbax writes, and one before the sums are written."""
    folder = workdir / "checkpoints"
    (folder / "00000006.sha256").unlink()
    (folder / "00000007.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    (folder / ".00000006.sha256.unfinished").write_text("")
    with _open(workdir) as opened:
        said = []
        found = opened.newest(_state(), STEPS, said.append)
        assert found is not None
        assert found[1] == _position(5)
        assert said == [f"checkpoint {folder / '00000006'} was not finished, so it is passed over."]
        opened.save(_state(6), _position(6), STEPS)
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["00000005", "00000005.sha256", "00000006", "00000006.sha256"]


def test_only_unfinished_ones_are_none(workdir):
    for name in ("00000005", "00000006"):
        (workdir / "checkpoints" / f"{name}.sha256").unlink()
    found, said = _newest(workdir)
    assert found is None
    assert len(said) == 2


def test_all_are_damaged(workdir):
    _flip(_files(workdir, "00000005")[0])
    _cut(_files(workdir, "00000006")[0])
    with pytest.raises(
        RunError,
        match=r"no checkpoint of workdir .* can be used: .*00000006 is "
        r"damaged: .*00000005 is damaged: .* give another folder to begin anew",
    ):
        _newest(workdir)
    assert len(_files(workdir)) > 5, "they are left as they are"


def test_a_refused_one_goes_when_the_next_is_written(workdir):
    _cut(_files(workdir)[0])
    with _open(workdir) as opened:
        opened.newest(_state(), STEPS, lambda line: None)
        opened.save(_state(5), _position(7), STEPS)
    names = {path.name[:8] for path in (workdir / "checkpoints").iterdir()}
    assert names == {"00000005", "00000007"}


# Of another run: what differs is said.


def _changed(**values):
    return lambda facts: facts | values


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda f: f | {"config": f["config"] | {"damping": 0.1}},
            "is of another config: damping (0.1 there, 0.3 here)",
        ),
        (
            lambda f: f | {"config": {k: v for k, v in f["config"].items() if k != "powell"}},
            "is of another config: powell ('missing' there, 0.2 here)",
        ),
        (
            lambda f: f | {"versions": f["versions"] | {"jax": "0.0.1"}},
            f"was written with jax 0.0.1, and this is {jax.__version__}, which may give other "
            "numbers; install that version",
        ),
        (
            lambda f: f | {"versions": f["versions"] | {"kfqn-optax": "9"}},
            "was written with kfqn-optax 9, and this is",
        ),
        (_changed(device="gpu: H100"), "on the device 'gpu: H100', and this is 'cpu: cpu'"),
        (
            lambda f: f | {"data": f["data"] | {"training": "0" * 64}},
            "the training examples are not the same",
        ),
        (
            lambda f: f | {"arrays": f["arrays"] | {"params/kernel": "float32[3, 4]"}},
            "params/kernel is 'float32[3, 4]' in it and 'float32[30, 20]' in this run",
        ),
        (
            lambda f: f | {"arrays": f["arrays"] | {"params/bias": "float32[3]"}},
            "'params/bias' is in it, but not in this run",
        ),
        (
            lambda f: f | {"arrays": {n: v for n, v in f["arrays"].items() if "count" not in n}},
            "opt_state/count is not in it",
        ),
        (_changed(arrays={}), "; and 4 more"),
        (_changed(format="their own"), "is not one of kfqn-train"),
        (_changed(config=3), "does not carry all the facts"),
        (_changed(versions=None), "does not carry all the facts"),
    ],
)
def test_of_another_run(tmp_path, change, message):
    """The newest one is; the one before is used."""
    with _open(tmp_path) as opened:
        opened.save(_state(5), _position(5), STEPS)
    with _open(tmp_path, facts=change(_facts())) as opened:
        opened._steps = [5]
        opened.save(_state(6), _position(6), STEPS)
    (_, position), (sentence,) = _newest(tmp_path)
    assert position == _position(5)
    assert message in sentence
    assert "\n" not in sentence


def test_free_keys_may_differ(workdir):
    config = tiny.config(epochs=7, checkpoint_every=3, keep_checkpoints=5, data_dir="x")
    assert _newest(workdir, facts=_facts(config=config))[1] == []


def test_other_examples_have_another_digest():
    data = tiny.dataset()
    one = fingerprint(CONFIG, data, _state())["data"]
    data.test[3, 4] += 1e-6
    other = fingerprint(CONFIG, data, _state())["data"]
    assert one["training"] == other["training"]
    assert one["test"] != other["test"]


def _rewritten(workdir, arrays=None, about=None):
    """Puts a checkpoint of our own making in the newest one's place, with sums that are right."""
    path = workdir / "checkpoints" / "00000006"
    about = {**_facts(), "position": _position(6)._asdict()} if about is None else about
    arrays = leaves.to_arrays(_state(6)) if arrays is None else arrays
    ocp.save(str(path), arrays, checkpointable_name="state", custom_metadata=about, overwrite=True)
    sums.write(path)


@pytest.mark.parametrize(
    "arrays",
    [
        {"params/kernel": np.zeros((3, 20), np.float32)},
        {"params/kernel": np.zeros((30, 20), np.float16)},
        {"more": np.zeros(3)},
    ],
)
def test_arrays_other_than_it_says(workdir, arrays):
    """Sums and facts are right, which anyone can write; the arrays are looked at all the same."""
    _rewritten(workdir, leaves.to_arrays(_state(6)) | arrays)
    (_, position), (sentence,) = _newest(workdir)
    assert position == _position(5)
    assert "says one thing of its arrays and holds another" in sentence


@pytest.mark.parametrize("about", [{}, {"a": [1]}, {"format": 1}])
def test_a_checkpoint_of_someone_else(workdir, about):
    _rewritten(workdir, about=about)
    assert "is not one of kfqn-train" in _newest(workdir)[1][0]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff" * 1000])
@pytest.mark.parametrize("name", ["_METADATA", ""])
def test_what_orbax_cannot_read(workdir, caplog, name, content):
    """A file, or all but one, holds nothing, and the sums say that this is right."""
    for path in _files(workdir):
        if path.name != "_CHECKPOINT_METADATA" and path.name.endswith(name):
            path.write_bytes(content)
    sums.write(workdir / "checkpoints" / "00000006")
    (_, position), (sentence,) = _newest(workdir)
    assert position == _position(5)
    assert "cannot be read by Orbax: " in sentence
    assert "\n" not in sentence
    assert caplog.text == ""


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"custom_metadata": 3}', "[" * 100_000], ids=range(5)
)
def test_metadata_that_are_none(workdir, caplog, content):
    (path,) = (path for path in _files(workdir) if path.name == "_CHECKPOINT_METADATA")
    path.write_text(content)
    sums.write(workdir / "checkpoints" / "00000006")
    (_, position), (sentence,) = _newest(workdir)
    assert position == _position(5)
    assert "is not one of kfqn-train" in sentence or "cannot be read by Orbax" in sentence
    assert caplog.text == ""


@pytest.mark.parametrize(
    "values",
    [
        {"epoch": 0},
        {"epoch": "1"},
        {"epoch": True},
        {"batch": 1},
        {"batch": -2},
        {"seconds": "0"},
        {"seconds": float("nan")},
        {"seconds": None},
        {"losses": [0.1]},
        {"losses": [0.1, None]},
        {"losses": 3},
        {"history": []},
        {"history": [{}, {}]},
        {"history": 7},
        {"history": [{"epoch": 0}, {"epoch": 1}]},
        {"more": 1},
    ],
)
def test_a_position_that_cannot_be(workdir, values):
    _rewritten(workdir, about={**_facts(), "position": _position(6)._asdict() | values})
    (_, position), (sentence,) = _newest(workdir)
    assert position == _position(5)
    assert "does not say how far its run was" in sentence


# The folder


def test_two_runs_at_once(tmp_path):
    with _open(tmp_path), pytest.raises(RunError, match="a run is going on in workdir .*; wait"):
        _open(tmp_path).__enter__()
    with _open(tmp_path):
        pass


def test_a_link_in_place_of_the_folder(tmp_path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to(tmp_path / "outside")
    with pytest.raises(RunError, match="checkpoints is a link; checkpoints are written into the"):
        _open(tmp_path / "run").__enter__()
    assert list((tmp_path / "outside").iterdir()) == []


def test_files_that_are_not_ours_are_left_alone(tmp_path):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for name in ("notes.txt", "000000006", "12", "00000001.sha256.bak"):
        (folder / name).write_text("")
    with _open(tmp_path) as opened:
        opened.save(_state(), _position(6), STEPS)
    assert len(list(folder.iterdir())) == 4 + 2


def test_a_full_disk(tmp_path, monkeypatch):
    def full(folder):
        raise OSError(28, "No space left on device")

    with _open(tmp_path) as opened:
        opened.save(_state(5), _position(5), STEPS)
        monkeypatch.setattr(sums, "write", full)
        with pytest.raises(
            RunError,
            match=r"00000006 could not be written: .*No space left .*; "
            "training stopped. When that is mended, the same command goes on",
        ):
            opened.save(_state(6), _position(6), STEPS)
    assert _newest(tmp_path)[0][1] == _position(5)


def _run(code):
    here = Path(__file__).parent  # there is a conftest in a folder below too
    folders = [str(here.parent), str(here), *sys.path]
    code = f"import sys; sys.path[:0] = {folders}; import conftest, test_checkpoints as t\n{code}"
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True
    )


def test_orbax_that_cannot_write(tmp_path):
    """A limit on the size of files stands for the disk; one sentence and no traceback."""
    done = _run(f"""
import resource, signal
import numpy as np, jax.numpy as jnp
state = t.TrainState(jnp.asarray(np.random.default_rng(0).normal(size=(300, 300))), ())
with t._open({str(tmp_path)!r}, facts=t._facts(state)) as opened:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    try:
        opened.save(state, t._position(6), 4)
    except t.RunError as error:
        print(error, file=sys.stderr)
""")
    assert "00000006 could not be written: " in done.stderr
    assert "File too large" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_store_that_orbax_cannot_read(workdir):
    """A process of its own, because Orbax leaves reads behind that complain when it is over."""
    for path in _files(workdir):
        if path.name == "manifest.ocdbt":
            path.write_bytes(b"\xff" * 1000)
    sums.write(workdir / "checkpoints" / "00000006")
    done = _run(f"""
(_, position), (sentence,) = t._newest({str(workdir)!r})
assert position == t._position(5)
print(sentence)
""")
    assert "00000006 cannot be read by Orbax: " in done.stdout


def test_a_file_is_replaced_and_a_link_not_followed(tmp_path):
    outside = tmp_path / "outside"
    outside.write_text("precious")
    (tmp_path / "file").symlink_to(outside)
    (tmp_path / ".file.unfinished").symlink_to(outside)
    replace(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_text() == "new"
    assert not (tmp_path / "file").is_symlink()
    assert outside.read_text() == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "outside"]


def test_orbax_is_imported_when_it_is_wanted():
    code = "import sys, kfqn_optax.experiment.cli; print(*sys.modules)"
    modules = subprocess.check_output([sys.executable, "-c", code], text=True).split()
    assert "kfqn_optax.experiment.checkpoints" in modules
    assert not [name for name in modules if name.startswith(("orbax", "tensorstore"))]
