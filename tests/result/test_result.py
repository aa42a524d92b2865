"""The labelled result: what it takes, says, refuses, averages, draws, and keeps on disk."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mi_hops.result import netcdf
from mi_hops.result.plots import Colours
from mi_hops.result.result import Result
from mi_hops.result.statistics import bootstrap_ci

PROVENANCE = {"model": "0f3a", "dtype": torch.float32, "seed": 0, "n": np.int64(3), "at": Path("x")}


def make(n=6, *, tokens=False, **keywords):
    effect = np.random.default_rng(0).normal(0.2, 0.3, size=(n, 2, 3))
    coords = {"example": [f"fact-{i}" for i in range(n)], "layer": [0, 1], "position": [0, 1, 2]}
    if tokens:
        coords["token"] = ("position", [" of", " the", " of"])
    arguments = {
        "coords": coords,
        "baselines": {"clean": ("example", np.linspace(0.1, 0.9, n))},
        "units": {"effect": "logits", "clean": "logits"},
        "provenance": PROVENANCE,
        "title": "Patching",
        "skipped": [("a", "no bridge"), ("b", "lengths"), ("c", "no bridge")],
    }
    return Result.from_arrays(
        {"effect": (("example", "layer", "position"), effect)}, **{**arguments, **keywords}
    )


# Making


def test_values_baselines_units_and_provenance():
    result = make()
    assert result.main == "effect" and result.baselines == ["clean"]
    np.testing.assert_array_equal(result.values, result["effect"].values)
    assert result["effect"].attrs["units"] == "logits"
    assert result.provenance == {
        "model": "0f3a",
        "dtype": "torch.float32",
        "seed": 0,
        "n": 3,
        "at": "x",
    }
    with pytest.raises(KeyError, match="there are"):
        result["nothing"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_tensors_are_taken_exactly(dtype):
    tensor = torch.randn(4, 2).to(dtype).requires_grad_()
    result = Result.from_arrays({"v": (("example", "layer"), tensor)}, provenance={})
    assert result.values.dtype == (np.float64 if dtype == torch.float64 else np.float32)
    np.testing.assert_array_equal(result.values, tensor.detach().double().numpy())


def test_a_dataset_or_a_mapping_will_do():
    dataset = make().data
    assert Result(dataset, provenance={}).data.identical(dataset)
    half = xr.Dataset({"v": ("layer", np.ones(2, np.float16))})
    assert Result(half, provenance={}).values.dtype == np.float32
    assert Result({"v": ("layer", [1, 2])}, provenance={}).values.tolist() == [1, 2]


def test_nonfinite_numbers_are_refused_with_their_place():
    values = np.zeros((2, 3))
    values[1, 2] = np.nan
    build = dict(coords={"example": ["misery", "it"]}, provenance={})
    arrays = {"p": (("example", "layer"), values)}
    with pytest.raises(
        ValueError, match=r"'p' is nan at index .*'layer': 2.*'it'.*allow_nonfinite"
    ):
        Result.from_arrays(arrays, **build)
    assert np.isnan(Result.from_arrays(arrays, allow_nonfinite=True, **build).values[1, 2])
    with pytest.raises(ValueError, match="'base' is inf"):
        Result.from_arrays(
            {"p": ("example", [0.0, 1.0])}, baselines={"base": ("example", [0, np.inf])}, **build
        )


ONE = ("layer", [1.0])


@pytest.mark.parametrize(
    ("values", "more", "message"),
    [
        ({}, {"baselines": {"b": ONE}}, "not a baseline"),
        ({"p": ONE}, {"units": {"q": "nats"}}, r"units for \['q'\]"),
        ({"p": ONE}, {"baselines": {"p": ONE}}, "both value and baseline"),
        ({"layer": ONE}, {}, "rename one"),
        ({"p": ONE, "q": ("layer", [1.0, 2.0])}, {}, "layer"),
        ({"p": ONE}, {"provenance": {"x": object()}}, "provenance has to be JSON"),
        ({"p/q": ONE}, {}, r"names \['p/q'\] have a slash"),
        ({"p": ("layer", [1j])}, {}, "complex"),
    ],
)
def test_bad_parts_are_refused(values, more, message):
    with pytest.raises(ValueError, match=message):
        Result.from_arrays(values, **{"provenance": {}, **more})


def test_describe_counts_the_used_and_the_reasons():
    assert make().describe().splitlines() == [
        "Patching",
        "n used 6, n skipped 3 (2 no bridge, 1 lengths)",
        "effect [example 6, layer 2, position 3]: logits",
        "clean [example 6]: baseline; logits",
    ]
    assert make().mean().describe().splitlines()[1:3] == [
        "n used 6, n skipped 3 (2 no bridge, 1 lengths)",
        "effect [layer 2, position 3]: logits; mean over n=6 examples",
    ]
    assert make(used=["x", "y"]).n_used == 2
    assert "n used 6" in repr(make()) and "n used 6" in make()._repr_html_()


# Parts and averages


def test_selection_keeps_labels_and_counts():
    part = make().sel(layer=1, example=["fact-2", "fact-0"])
    np.testing.assert_array_equal(part.values, make().values[[2, 0], 1])
    assert part.n_used == 2 and part.skipped == make().skipped
    assert make().sel(example="fact-1").n_used == 1
    with pytest.raises(ValueError, match="no dimension"):
        make().sel(depth=1)
    with pytest.raises(ValueError, match="labels begin with"):
        make().sel(example="fact-9")


def test_means_and_medians_leave_nan_out():
    values = np.array([[1.0, 2.0], [np.nan, 4.0], [3.0, 9.0]])
    result = Result.from_arrays(
        {
            "v": (("example", "layer"), values),
            "said": ("example", ["a", "b", "c"]),
            "right": ("example", [True, False, True]),
        },
        provenance={},
        allow_nonfinite=True,
    )
    mean = result.mean()
    assert mean.values.tolist() == [2.0, 5.0]
    assert mean["right"].item() == pytest.approx(2 / 3)
    assert "said" not in mean.data
    assert mean["v"].attrs["averaging"] == "mean over n=2 to 3 examples"
    assert result.median().values.tolist() == [2.0, 4.0]
    both = mean.mean("layer")
    assert both["v"].attrs["averaging"] == ("mean over n=2 layers of mean over n=2 to 3 examples")
    assert both.n_used == 3
    assert result.mean(["example", "layer"]).values == pytest.approx(19 / 5)
    with pytest.raises(ValueError, match="no dimension"):
        result.mean("head")


def test_ci_is_the_bootstrap_with_labels():
    result = make(20)
    interval = result.ci(seed=4)
    lower, upper = bootstrap_ci(result.values, seed=4)
    np.testing.assert_allclose(interval["lower"], lower)
    np.testing.assert_allclose(interval["upper"], upper)
    np.testing.assert_allclose(interval["estimate"], result.mean().values)
    assert (interval["n"] == 20).all()
    assert interval["estimate"].dims == ("layer", "position")
    assert interval["layer"].values.tolist() == [0, 1]
    over_layers = result.ci("layer", statistic="median")
    np.testing.assert_allclose(over_layers["estimate"], np.median(result.values, axis=1))
    with pytest.raises(ValueError, match="no dimension 'head'"):
        result.ci("head")


@pytest.mark.parametrize("n", [0, 1])
def test_ci_of_none_and_one(n):
    interval = make(n).ci()
    assert np.isnan(interval["lower"]).all() and np.isnan(interval["upper"]).all()
    assert (interval["n"] == n).all()
    np.testing.assert_array_equal(np.isnan(interval["estimate"]), np.full((2, 3), n == 0))


def test_paired_difference_matches_examples_by_label():
    result = make(12)
    shuffled = result.data.isel(example=np.random.default_rng(0).permutation(12))
    shifted = shuffled.assign(effect=shuffled["effect"] - 0.5)
    difference = result.difference_ci(Result(shifted, provenance={}))
    for name in ("estimate", "lower", "upper"):
        np.testing.assert_allclose(difference[name], 0.5)
    assert (difference["n"] == 12).all() and (difference["n_other"] == 12).all()
    against = result.difference_ci("clean")
    expected = (result["effect"] - result["clean"]).mean("example")
    np.testing.assert_allclose(against["estimate"], expected)
    with pytest.raises(ValueError, match=r"do not pair up .* paired=False"):
        result.difference_ci(make(11))
    with pytest.raises(ValueError, match="different labels"):
        result.difference_ci(result["effect"].isel(layer=[0]))


def test_differences_of_other_units_or_labels_are_refused():
    probability = make(units={"effect": "probability", "clean": "logits"})
    with pytest.raises(ValueError, match="'effect' is in logits and in probability"):
        make().difference_ci(probability)

    def numbered(labels):
        return Result.from_arrays(
            {"x": ("example", np.arange(3.0))}, coords={"example": labels}, provenance={}
        )

    for subtract in (lambda a, b: a - b, lambda a, b: a.difference_ci(b)):
        with pytest.raises(ValueError, match="do not pair up"):
            subtract(numbered([0, 1, 2]), numbered(["0", "1", "2"]))


def test_counts_labels_and_columns_of_any_kind():
    plain = Result.from_arrays(
        {"x": (("example", "role"), np.ones((2, 2)))}, provenance={}, used=np.int64(2)
    )
    assert plain.n_used == 2
    with pytest.raises(ValueError, match="no {'example': 7} in the result"):
        plain.sel(example=7)
    frame = plain.to_dataframe()
    assert set(frame["role"]) == {"value"} and frame["role (label)"].tolist() == [0, 1, 0, 1]


def test_groups_are_compared_unpaired():
    result = make(9)
    passed = np.arange(9) < 4
    by_mask = result.difference_ci(groups=passed)
    expected = result.values[:4].mean(0) - result.values[4:].mean(0)
    np.testing.assert_allclose(by_mask["estimate"], expected)
    assert (by_mask["n"] == 4).all() and (by_mask["n_other"] == 5).all()
    assert ((by_mask["lower"] < expected) & (expected < by_mask["upper"])).all()
    named = Result(result.data.assign_coords(passed=("example", passed)), provenance={})
    assert named.difference_ci(groups="passed").identical(by_mask)
    apart = result.difference_ci(make(5), paired=False)
    np.testing.assert_allclose(apart["estimate"], result.values.mean(0) - make(5).values.mean(0))
    nobody = result.difference_ci(groups=np.zeros(9, bool))
    assert np.isnan(nobody["estimate"]).all() and (nobody["n"] == 0).all()
    with pytest.raises(ValueError, match="9 times true or false"):
        result.difference_ci(groups=[True, False])
    with pytest.raises(ValueError, match="either other or groups"):
        result.difference_ci("clean", groups=passed)
    with pytest.raises(ValueError, match="either other or groups"):
        result.difference_ci()


def test_long_frame_has_one_row_for_each_cell_and_example():
    frame = make(2, tokens=True).to_dataframe()
    assert len(frame) == 2 * 2 * 3 + 2
    assert list(frame.columns[:2]) == ["variable", "role"] and frame.columns[-1] == "value"
    row = frame[
        (frame.variable == "effect")
        & (frame.example == "fact-1")
        & (frame.layer == 0)
        & (frame.position == 2)
    ]
    assert row["value"].item() == make(2).values[1, 0, 2] and row["token"].item() == " of"
    clean = frame[frame.role == "baseline"]
    assert clean["value"].tolist() == [0.1, 0.9] and clean["layer"].isna().all()
    single = make(2).mean(["example", "layer", "position"]).to_dataframe()
    assert single["variable"].tolist() == ["effect", "clean"]


# Disk


def assert_same(loaded, result):
    xr.testing.assert_identical(loaded.data, result.data)
    assert loaded.provenance == result.provenance
    assert loaded.skipped == result.skipped
    assert (loaded.title, loaded.main, loaded.n_used) == (result.title, result.main, result.n_used)


def test_round_trip(tmp_path):
    result = make(tokens=True, used=17)
    assert result.save(tmp_path / "r.nc") == tmp_path / "r.nc"
    assert_same(Result.load(tmp_path / "r.nc"), result)
    mean = result.mean()
    mean.save(tmp_path / "mean.nc")
    assert_same(Result.load(tmp_path / "mean.nc"), mean)
    assert xr.load_dataset(tmp_path / "r.nc", engine="h5netcdf")["effect"].shape == (6, 2, 3)


TEXT = st.text(max_size=4)  # NUL and line breaks included
CELLS = {
    "float": st.floats(width=64),
    "int": st.integers(-(2**63), 2**63 - 1),
    "bool": st.booleans(),
    "text": TEXT,
    "text or missing": st.none() | TEXT,
    "mixed": st.none() | st.booleans() | st.integers(-100, 100) | TEXT,
}


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
@pytest.mark.slow
def test_anything_round_trips(tmp_path, data):
    sizes = {
        dim: data.draw(st.integers(0, 3), label=dim) for dim in ("example", "layer", "kind of x")
    }
    arrays = {}
    for name, cells in CELLS.items():
        dims = data.draw(st.lists(st.sampled_from(sorted(sizes)), unique=True), label=name)
        shape = tuple(sizes[dim] for dim in dims)
        plain = {"float": float, "int": np.int64, "bool": bool}.get(name, object)
        arrays[name] = (dims, data.draw(hnp.arrays(plain, shape, elements=cells)))
    narrow = data.draw(st.sampled_from([np.float32, np.uint8, np.int16, np.float16]))
    arrays["narrow"] = (["layer"], np.arange(sizes["layer"], dtype=narrow))
    labels = data.draw(st.lists(TEXT, min_size=sizes["example"], max_size=sizes["example"]))
    result = Result.from_arrays(
        arrays,
        coords={
            "example": labels,
            "layer": np.arange(sizes["layer"]),
            "token": ("layer", labels[:0] + ["a\x00"] * sizes["layer"]),
        },
        units={"float": "seconds"},
        provenance={"text": data.draw(TEXT), "list": [1, None, True]},
        skipped=data.draw(st.lists(st.tuples(TEXT, TEXT), max_size=2)),
        allow_nonfinite=True,
    )
    path = tmp_path / "any.nc"
    result.save(path, overwrite=True)
    loaded = Result.load(path)
    for name in result.data.variables:
        before, after = result[name], loaded[name]
        assert before.dims == after.dims and before.attrs == after.attrs
        if before.dtype.kind in "biuf":
            assert before.dtype == after.dtype
            np.testing.assert_array_equal(before.values, after.values)
        else:
            one, other = before.values.ravel().tolist(), after.values.ravel().tolist()
            assert one == other and list(map(type, one)) == list(map(type, other))
    assert loaded.provenance == result.provenance and loaded.skipped == result.skipped


@pytest.mark.parametrize("labels", [["a", "a\x00", "", " ", "\ud800", None, 3], ["a", "\ud800"]])
def test_labels_are_kept_to_the_letter(tmp_path, labels):
    values = np.arange(float(len(labels)))
    result = Result.from_arrays(
        {"v": ("position", values)}, coords={"token": ("position", labels)}, provenance={}
    )
    assert result["token"].values.tolist() == labels
    loaded = Result.load(result.save(tmp_path / "r.nc"))
    assert loaded["token"].values.tolist() == labels


def test_saving_does_not_change_the_result_or_replace_unasked(tmp_path):
    result = make(tokens=True)
    before = result.data.copy(deep=True)
    path = result.save(tmp_path / "r.nc")
    xr.testing.assert_identical(result.data, before)
    with pytest.raises(FileExistsError, match="overwrite=True"):
        make(2).save(path)
    assert_same(Result.load(path), result)
    make(2).save(path, overwrite=True)
    assert Result.load(path).n_used == 2
    with pytest.raises(FileNotFoundError, match="no folder"):
        result.save(tmp_path / "no" / "r.nc")
    with pytest.raises(ValueError, match="does not end in '.nc'"):
        result.save(tmp_path / "r.csv")


@pytest.mark.parametrize("stage", ["write", "replace"])
def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, stage):
    path = make(2).save(tmp_path / "r.nc")
    kept = path.read_bytes()
    write = Path.write_bytes

    def fail_half_way(self, data):
        write(self, data[:100])
        raise OSError("disk full")

    def fail(*args):
        raise OSError("disk full")

    if stage == "write":
        monkeypatch.setattr(Path, "write_bytes", fail_half_way)
    else:
        monkeypatch.setattr(netcdf.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        make(4).save(path, overwrite=True)
    with pytest.raises(OSError, match="disk full"):
        make(4).save(tmp_path / "new.nc")
    assert os.listdir(tmp_path) == ["r.nc"] and path.read_bytes() == kept


def test_files_of_others_are_refused(tmp_path):
    (tmp_path / "text.nc").write_text("not NetCDF")
    xr.Dataset({"v": ("x", [1.0])}).to_netcdf(tmp_path / "other.nc", engine="h5netcdf")
    for name in ("text.nc", "other.nc"):
        with pytest.raises(ValueError, match=f"{name} is not a result saved by mi_hops"):
            Result.load(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        Result.load(tmp_path / "nothing.nc")
    dataset = xr.Dataset({"v": ("x", [1.0])})
    netcdf.write(dataset, tmp_path / "new.nc", header={"format": 99})
    with pytest.raises(ValueError, match="newer version"):
        Result.load(tmp_path / "new.nc")


def test_a_damaged_file_is_refused_before_it_is_read(tmp_path):
    path = make(2).save(tmp_path / "r.nc")
    whole = path.read_bytes()
    for at in range(0, len(whole), 97):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        if at < len(whole) - 80:
            with pytest.raises(ValueError, match="is damaged: it does not match its checksum"):
                Result.load(path)
    path.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match="is not a result saved by mi_hops"):
        Result.load(path)
    # Written anew by xarray it has no checksum, and is read.
    path.write_bytes(whole)
    again = xr.load_dataset(path, engine="h5netcdf")
    again.to_netcdf(tmp_path / "again.nc", engine="h5netcdf")
    assert_same(Result.load(tmp_path / "again.nc"), make(2))


# Drawing


def test_plot_says_what_is_averaged_and_draws_the_mean():
    result = make()
    figure = result.plot()
    assert figure.layout.title.text == "Patching (mean over n=6 examples)"
    np.testing.assert_allclose(figure.data[0].z, result.values.mean(0))
    interval = result.ci(n_resamples=1000)
    low, high = interval["lower"].values[1, 0], interval["upper"].values[1, 0]
    assert f"n: 6<br>95% from: {low:.6g}<br>to: {high:.6g}" in figure.data[0].customdata[1][0]
    assert result.mean().plot().layout.title.text == "Patching (mean over n=6 examples)"
    assert figure.layout.coloraxis.cmin == -figure.layout.coloraxis.cmax
    assert figure.layout.coloraxis.colorbar.title.text.startswith("effect (logits)")


def test_one_example_shows_its_tokens():
    figure = make(tokens=True).sel(example=["fact-3"]).plot(colours=Colours("effect", high=2.0))
    assert list(figure.layout.xaxis.ticktext) == [" of 0", " the 1", " of 2"]
    assert figure.layout.title.text == "Patching (example fact-3)"
    np.testing.assert_array_equal(figure.data[0].z, make().values[3])
    assert figure.layout.coloraxis.cmax == 2.0


def test_one_axis_makes_lines_with_bands_and_baselines():
    result = make()
    figure = result.sel(position=1).plot()
    drawn = [trace for trace in figure.data if trace.mode == "lines+markers"]
    np.testing.assert_allclose(drawn[0].y, result.values[:, :, 1].mean(0))
    assert any(trace.fill == "toself" for trace in figure.data)
    assert figure.layout.shapes[0].y0 == pytest.approx(0.5)
    assert figure.layout.yaxis.title.text == "effect (logits)"
    assert figure.layout.title.text == "Patching (mean over n=6 examples)"
    grouped = result.plot(kind="lines")
    names = [trace.name for trace in grouped.data if trace.mode == "lines+markers"]
    assert names == ["0", "1", "2"]


@pytest.mark.parametrize(
    ("variable", "drawn"),
    [
        ("score", {"clean": 0.9, "noisy": 0.2}),
        ("indirect", {"total": 0.7}),
        ("change", {}),
        ("attribution", {}),
        ("spread", {"total_spread": 0.1}),
    ],
)
def test_baselines_are_drawn_on_like_quantities_only(variable, drawn):
    """A score of 0.9 is no place on an axis of changes, though their unit is one."""
    baselines = {"clean": 0.9, "noisy": 0.2, "total": 0.7, "total_spread": 0.1}
    result = Result.from_arrays(
        {variable: (("example", "layer"), np.full((2, 3), 0.1))},
        baselines={name: ("example", [value] * 2) for name, value in baselines.items()},
        units=dict.fromkeys((variable, *baselines), "probability"),
        provenance={},
    )
    lines = sorted(shape.y0 for shape in result.plot(kind="lines").layout.shapes)
    assert lines == pytest.approx(sorted(drawn.values()))


def test_text_axes_make_bars_and_positive_units_a_sequential_scale():
    values = np.array([[True, False], [True, True], [False, True]])
    result = Result.from_arrays(
        {"right": (("example", "method"), values)},
        coords={"method": ["CREME", "ROME"]},
        units={"right": "share"},
        provenance={},
    )
    figure = result.plot()
    assert figure.data[0].type == "bar"
    np.testing.assert_allclose(figure.data[0].y, [2 / 3, 2 / 3])
    assert list(figure.layout.xaxis.ticktext) == ["CREME", "ROME"]
    grid = {"p": (("layer", "head"), [[0.1, 0.2], [0.3, 0.4]])}
    made = Result.from_arrays(grid, units={"p": "probability"}, provenance={}).plot()
    assert "darker: higher" in made.layout.coloraxis.colorbar.title.text


def test_a_third_dimension_makes_panels_and_a_fourth_is_refused():
    values = np.arange(24.0).reshape(2, 2, 3, 2)
    dims = ("layer", "component", "position", "metric")
    result = Result.from_arrays(
        {"v": (dims, values)},
        coords={"component": ["attn", "mlp"], "metric": ["p", "rank"]},
        provenance={},
    )
    with pytest.raises(ValueError, match="select or average"):
        result.plot()
    figure = result.sel(metric="rank").plot()
    for index, trace in enumerate(figure.data):
        np.testing.assert_array_equal(trace.z, values[:, index, :, 1])
    with pytest.raises(ValueError, match="choose heatmap"):
        result.plot(kind="pie")
    with pytest.raises(ValueError, match="needs 1 or 2"):
        result.mean(list(dims)).plot()


def test_tokens_that_a_batch_shares_stay_on_the_axis():
    tokens = np.array([["<s>", " a", " b", " is"], ["<s>", " a", " c", " is"]], dtype=object)
    result = Result.from_arrays(
        {"v": (("example", "layer", "position"), np.zeros((2, 3, 4)))},
        coords={"position": range(4), "token": (("example", "position"), tokens)},
        provenance={},
    )
    expected = ("&lt;s&gt; 0", " a 1", "2", " is 3")
    assert result.plot().layout.xaxis.ticktext == expected
    assert result.mean().plot().layout.xaxis.ticktext == expected
    assert result.median()["token"].values.tolist() == ["<s>", " a", "", " is"]
    other = result.assign(coords={"token": (("example", "position"), [list("abcd"), list("aefg")])})
    assert other.plot().layout.xaxis.ticktext == ("0", "1", "2", "3")
    roles = result.assign(coords={"position": ["first hop", "b", "c", "last"]})
    assert roles.plot().layout.xaxis.ticktext == ("first hop", "b", "c", "last")


def test_paths_are_drawn_as_senders_by_receivers():
    heads = [f"L{layer}H{head}" for layer in range(2) for head in range(3)]
    values = np.arange(36.0).reshape(2, 6, 3)
    coords = {"sender": heads, "receiver": ["L1H0.q", "MLP1", "logits"]}
    both = Result.from_arrays(
        {"effect": (("example", "sender", "receiver"), values)}, coords=coords, provenance={}
    )
    figure = both.plot()
    np.testing.assert_allclose(figure.data[0].z, values.mean(0))
    assert figure.layout.yaxis.ticktext == tuple(heads)
    assert (figure.layout.xaxis.title.text, figure.layout.yaxis.title.text) == (
        "receiver",
        "sender",
    )
    grid = both.sel(receiver=["logits"]).plot()  # heads alone: where they are in the model
    np.testing.assert_allclose(grid.data[0].z, values.mean(0)[:, 2].reshape(2, 3))
    assert grid.data[0].customdata[1][2].startswith("L1H2<br>")


class TestSubtraction:
    def test_numbers_are_aligned_by_label_and_keep_unit_and_provenance(self):
        left = make()
        right = left.sel(example=left["example"].values[::-1]).assign(provenance={"seed": 7})
        less = left - right
        np.testing.assert_array_equal(less.values, np.zeros_like(left.values))
        assert less[less.main].attrs["units"] == left[left.main].attrs["units"]
        assert less["example"].values.tolist() == left["example"].values.tolist()
        assert less.provenance["of"] == left.provenance
        assert less.provenance["less"]["seed"] == 7
        assert less.baselines == []
        with xr.set_options(keep_attrs=True):  # older versions drop them
            doubled = left.assign({left.main: left[left.main] * 2})
        np.testing.assert_allclose((doubled - left).values, left.values)
        assert left.skipped == (left - left).skipped

    def test_what_does_not_fit_is_refused_with_a_sentence(self):
        left = make()
        with pytest.raises(ValueError, match="has the dimensions .*average or select"):
            left - left.mean()
        with pytest.raises(ValueError, match="cannot be paired|do not pair up"):
            left - left.sel(example=left["example"].values[:1])
        other = Result.from_arrays({"else": ("example", [1.0])}, provenance={})
        with pytest.raises(ValueError, match="nothing to subtract"):
            left - other
        array = left[left.main].assign_attrs(units="nats")
        with pytest.raises(ValueError, match="units must be equal"):
            left - left.assign({left.main: array})
        with pytest.raises(TypeError):
            left - 1


def test_assign_adds_labels_variables_and_provenance():
    result = make()
    n = len(result["example"])
    more = result.assign(
        {"twice": result[result.main] * 2},
        coords={"half": ("example", ["a"] * n)},
        provenance={"note": "x"},
        title="Another",
        main="twice",
    )
    assert more["half"].values.tolist() == ["a"] * n
    assert more.provenance == {**result.provenance, "note": "x"}
    assert (more.title, more.main, more.skipped) == ("Another", "twice", result.skipped)
    assert result.title != "Another" and "twice" not in result.data


def test_a_cell_is_never_flooded():
    names = [f"variable {i} with a long name" for i in range(200)]
    result = Result.from_arrays(
        {name: (("example", "layer"), np.zeros((3, 4))) for name in names},
        provenance={},
        skipped=[(str(i), f"reason {i} of many") for i in range(300)],
    )
    assert len(repr(result)) < 2000
    assert "variable 0" in repr(make(2).assign({"variable 0": make(2)[make(2).main]}))
