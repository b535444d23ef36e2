"""The teacher: condensing, rotations, pairs, scores and codes against numpy, sizes, determinism and the cache."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.spatial.distance import pdist
from scipy.stats import chisquare

from configs.default import get_config
from kdsr_jax import teacher as teaching
from kdsr_jax.cache import cache_folder
from kdsr_jax.errors import UserError
from kdsr_jax.models import autoencoder
from kdsr_jax.teacher import Teacher, balanced_order, draw_pairs, fit_teacher, fit_teachers, pair_correlations, rotate

pytestmark = pytest.mark.usefixtures("quick_compilation")

WIDTH, SPLITS, CODES, MISSING = 8, 4, 12, (5, 9)
SCORES = {
    "cosine": lambda x, y: x @ y / np.sqrt((x @ x) * (y @ y)),
    "dot": lambda x, y: x @ y,
    "euclidean": lambda x, y: np.sqrt(((x - y) ** 2).sum()),
    "manhattan": lambda x, y: np.abs(x - y).sum(),
}


def make_features(num_items=40, dim=16, power=1.0, seed=0):
    """Features off the origin whose k-th direction has a spread of k ** -power; two items have none."""
    rng = np.random.default_rng(seed)
    spread = np.arange(1, dim + 1) ** -power
    rotation = np.linalg.qr(rng.normal(size=(dim, dim)))[0]
    values = ((rng.normal(size=(num_items + 1, dim)) * spread) @ rotation + 3).astype(np.float32)
    has_feature = np.ones(num_items + 1, bool)
    has_feature[[0, *MISSING]] = False
    values[~has_feature] = 0
    return SimpleNamespace(values=values, has_feature=has_feature)


def make_settings(**changes):
    settings = get_config().teacher
    settings.update({"num_splits": SPLITS, "num_codes": CODES, "autoencoder": "pca"} | changes)
    return settings


def centred(features):
    x = features.values[features.has_feature]
    return jnp.asarray(x - x.mean(0))


@pytest.fixture(scope="module")
def features():
    return make_features()


@pytest.fixture(scope="module")
def fitted(features):
    """(teacher, report) with the default quantizer and score."""
    return fit_teacher(features, make_settings(), WIDTH)


def assert_same(first, second):
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)


# --- condensing ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[0.0, 0.5, 1.0])
def condensed(request):
    """x, its principal components and the linear autoencoder's results, for a flat and two falling spectra."""
    x = centred(make_features(power=request.param))
    return x, autoencoder.pca(x, WIDTH), autoencoder.linear(x, WIDTH, jax.random.key(0))


def test_pca_loses_the_smallest_eigenvalues(condensed):
    x, (code, lost), _ = condensed
    eigenvalues = np.linalg.eigvalsh(np.cov(np.asarray(x, np.float64).T, bias=True))[::-1]
    np.testing.assert_allclose(code.var(0), eigenvalues[:WIDTH], rtol=1e-3)
    np.testing.assert_allclose(lost, eigenvalues[WIDTH:].sum() / x.shape[1], rtol=1e-3)


def test_linear_autoencoder_is_within_a_hundredth_of_pca(condensed):
    x, (_, best), (raw, orthonormal, lost) = condensed
    assert best * 0.9999 <= lost <= best * 1.01
    assert raw.shape == orthonormal.shape == (len(x), WIDTH)
    # Its orthonormal coordinates span what it reconstructs, so distances are those between the reconstructions.
    onto = np.linalg.lstsq(np.asarray(orthonormal), np.asarray(x), rcond=None)[0]
    np.testing.assert_allclose(pdist(orthonormal), pdist(orthonormal @ onto), rtol=0.05)
    np.testing.assert_allclose(np.mean((x - orthonormal @ onto) ** 2), lost, rtol=0.01)


def test_sigmoid_autoencoder_learns():
    x = 3 * centred(make_features(num_items=300))
    code, lost = autoencoder.sigmoid(x, WIDTH, jax.random.key(0))
    assert code.shape == (298, WIDTH) and 0 < code.min() and code.max() < 1
    assert autoencoder.pca(x, WIDTH)[1] < lost < 0.5 * jnp.mean(x**2)


# --- rotation --------------------------------------------------------------------------------------------------------


@pytest.fixture
def skewed():
    """A centred code whose components fall steeply in variance, as principal components do."""
    code = np.random.default_rng(1).normal(size=(50, WIDTH)) * 2.0 ** -np.arange(WIDTH)
    return jnp.asarray(code - code.mean(0), jnp.float32)


@pytest.mark.parametrize("rotation", ["balanced", "random"])
def test_rotations_keep_distances(skewed, rotation):
    rotated = rotate(skewed + 5, rotation, SPLITS, jax.random.key(0))
    np.testing.assert_allclose(pdist(rotated), pdist(skewed), rtol=1e-4)
    np.testing.assert_allclose(rotated.mean(0), 0, atol=1e-5)
    assert np.abs(rotated - skewed).max() > 0.1


def test_no_rotation_keeps_the_code(skewed):
    np.testing.assert_array_equal(rotate(skewed + 5, "none", SPLITS, jax.random.key(0)), skewed + 5)


def test_random_rotation_follows_its_key(skewed):
    first, again, other = (rotate(skewed, "random", SPLITS, jax.random.key(k)) for k in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 0.1


@pytest.mark.parametrize(
    ("variances", "splits", "order"),
    [
        ([8.0, 4.0, 2.0, 1.0], 2, [0, 3, 1, 2]),  # 8 * 1 = 4 * 2
        ([1.0, 8.0, 2.0, 4.0], 2, [1, 0, 3, 2]),  # the same in another order
        ([100.0, 3.0, 2.0, 1.0], 2, [0, 3, 1, 2]),  # 3 * 2 stays below 100, then only the first chunk has room
        ([5.0, 7.0, 6.0], 1, [1, 2, 0]),
        ([5.0, 7.0, 6.0], 3, [1, 2, 0]),
    ],
)
def test_balanced_order_by_hand(variances, splits, order):
    np.testing.assert_array_equal(balanced_order(np.array(variances), splits), order)


def test_balanced_order_deals_every_component_once_even_without_variance():
    order = balanced_order(np.array([0.0, 2.0, 0.0, 1.0, 0.0, 0.0]), 3)
    assert sorted(order) == list(range(6))


def test_balanced_products_vary_much_less_than_in_the_order_of_pca(skewed):
    def spread(code):
        variances = np.asarray(code).var(0).reshape(SPLITS, -1)
        return np.ptp(np.log(variances).sum(1))

    assert spread(rotate(skewed, "balanced", SPLITS, None)) < 0.2 * spread(skewed)


# --- pairs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_pairs", [15, 16, 10**6])
def test_few_pairs_are_all_taken(num_pairs):
    i, j = draw_pairs(jax.random.key(0), 6, num_pairs)
    assert_same((i, j), np.triu_indices(6, 1))


def test_drawn_pairs_are_uniform_over_i_below_j():
    draw = jax.jit(jax.vmap(lambda key: jnp.stack(draw_pairs(key, 6, 14))))
    i, j = np.moveaxis(np.asarray(draw(jax.random.split(jax.random.key(1), 3000))), 1, 0)
    assert (i < j).all() and i.min() == 0 and j.max() == 5
    counts = np.zeros((6, 6))
    np.add.at(counts, (i, j), 1)
    assert chisquare(counts[np.triu_indices(6, 1)]).pvalue > 0.01


@pytest.mark.parametrize("score_fn", list(SCORES))
def test_scores_and_codes_of_pairs_equal_numpy(score_fn):
    rng = np.random.default_rng(2)
    condensed = rng.normal(size=(7, WIDTH)).astype(np.float32)
    codebook = rng.normal(size=(CODES, SPLITS)).astype(np.float32)
    first, second = (index.astype(np.int32) for index in np.triu_indices(7, 1))
    teacher = Teacher(jnp.asarray(condensed), jnp.ones(7, bool), jnp.asarray(codebook))
    run = jax.jit(pair_correlations, static_argnums=(3, 4))
    scores, codes = run(teacher, first, second, score_fn, SPLITS)
    score = SCORES[score_fn]
    for p, (i, j) in enumerate(zip(first, second, strict=True)):
        x, y = condensed[i].astype(np.float64), condensed[j].astype(np.float64)
        chunks = zip(x.reshape(SPLITS, -1), y.reshape(SPLITS, -1), strict=True)
        vector = np.array([score(a, b) for a, b in chunks])
        np.testing.assert_allclose(scores[p], score(x, y), rtol=1e-4, atol=1e-5)
        assert codes[p] == ((codebook - vector) ** 2).sum(1).argmin()
    assert len(set(codes.tolist())) > 2


@pytest.mark.parametrize("score_fn", list(SCORES))
def test_pairs_among_a_few_items_are_like_any_pairs(score_fn):
    rng = np.random.default_rng(3)
    codebook = rng.normal(size=(CODES, SPLITS)).astype(np.float32)
    teacher = Teacher(rng.normal(size=(9, WIDTH)).astype(np.float32), np.ones(9, bool), codebook)
    items, first, second = np.array([4, 0, 8, 4, 1]), np.array([0, 2, 4, 0]), np.array([1, 4, 3, 3])
    scores, codes = teaching.correlations_among(teacher, items, first, second, score_fn, SPLITS)
    expected = pair_correlations(teacher, items[first], items[second], score_fn, SPLITS)
    np.testing.assert_allclose(scores, expected[0], rtol=1e-6)
    np.testing.assert_array_equal(codes, expected[1])


def test_pairs_of_missing_items_are_finite():
    teacher = Teacher(jnp.zeros((3, WIDTH)), jnp.zeros(3, bool), jnp.ones((CODES, SPLITS)))
    run = jax.jit(pair_correlations, static_argnums=(3, 4))
    scores, codes = run(teacher, jnp.array([0, 1]), jnp.array([1, 2]), "cosine", SPLITS)
    assert not scores.any() and not codes.any()


# --- fitting ---------------------------------------------------------------------------------------------------------


def test_condensed_features_have_unit_mean_square_and_zero_rows_for_missing(fitted, features):
    teacher, report = fitted
    condensed = np.asarray(teacher.condensed)
    np.testing.assert_allclose((condensed[features.has_feature] ** 2).mean(), 1, rtol=1e-4)
    assert condensed.shape == (41, WIDTH) and not condensed[~features.has_feature].any()
    assert condensed[features.has_feature].any(1).all()
    np.testing.assert_array_equal(teacher.has_feature, features.has_feature)
    assert teacher.codebook.shape == (CODES, SPLITS)
    np.testing.assert_allclose(np.sum(report["chunk_variance"]), WIDTH, rtol=1e-3)


def test_the_report_is_what_the_pairs_show(fitted, features):
    teacher, report = fitted
    covered = np.flatnonzero(features.has_feature).astype(np.int32)
    first, second = (covered[index] for index in np.triu_indices(len(covered), 1))
    codes = np.asarray(pair_correlations(teacher, first, second, "cosine", SPLITS)[1])
    x, y = (np.asarray(teacher.condensed)[index].reshape(-1, SPLITS, 2) for index in (first, second))
    vectors = (x * y).sum(-1) / np.linalg.norm(x, axis=-1) / np.linalg.norm(y, axis=-1)
    distortion = ((vectors - np.asarray(teacher.codebook)[codes]) ** 2).sum(1).mean()
    shares = np.bincount(codes, minlength=CODES) / len(codes)
    np.testing.assert_allclose(report["distortion"], distortion, rtol=1e-3)
    np.testing.assert_allclose(report["perplexity"], np.exp(-(shares * np.log(shares)).sum()), rtol=0.01)
    assert report["used_codes"] == CODES
    lost = autoencoder.pca(centred(features), WIDTH)[1] / jnp.mean(centred(features) ** 2)
    np.testing.assert_allclose(report["reconstruction_error"], lost, rtol=1e-4)


def test_features_of_items_without_features_have_no_say(fitted, features):
    values = features.values.copy()
    values[~features.has_feature] = 100.0
    again, _ = fit_teacher(SimpleNamespace(values=values, has_feature=features.has_feature), make_settings(), WIDTH)
    assert_same(again, fitted[0])


def test_the_seed_decides(fitted, features):
    assert_same(fit_teacher(features, make_settings(), WIDTH)[0], fitted[0])
    other, _ = fit_teacher(features, make_settings(seed=1), WIDTH)
    assert np.any(other.codebook != fitted[0].codebook)


@pytest.mark.parametrize("quantizer", ["vq", "kmeans", "vq_joint"])
def test_quantizers_beat_their_random_start_and_use_all_codes(features, quantizer):
    teacher, report = fit_teacher(features, make_settings(quantizer=quantizer), WIDTH)
    covered = np.flatnonzero(features.has_feature)
    first, second = (covered[index] for index in np.triu_indices(len(covered), 1))
    vectors = np.asarray(teaching.correlation_vectors(teacher.condensed, first, second, "cosine", SPLITS))
    rng = np.random.default_rng(3)
    starts = [vectors[rng.choice(len(vectors), CODES, replace=False)] for _ in range(20)]
    random = [((vectors[:, None] - start[None]) ** 2).sum(-1).min(1).mean() for start in starts]
    assert report["distortion"] < 0.9 * min(random)
    assert report["used_codes"] == CODES
    assert CODES / 2 < report["perplexity"] <= CODES
    np.testing.assert_allclose((teacher.condensed[covered] ** 2).mean(), 1, rtol=1e-4)


def test_codes_that_shape_the_features_need_their_pairs_too(features):
    few = make_settings(quantizer="vq_joint", num_codes=100, num_pairs=45)
    with pytest.raises(UserError, match="teacher.num_codes=100: image has only 45 item pairs"):
        fit_teachers({"image": features}, few, 8, codes=False)


@pytest.mark.parametrize("score_fn", ["dot", "euclidean", "manhattan"])
def test_every_score_function_fits(features, score_fn):
    teacher, report = fit_teacher(features, make_settings(score_fn=score_fn), WIDTH)
    assert all(np.isfinite(leaf).all() for leaf in teacher)
    assert report["used_codes"] == CODES and np.isfinite(report["distortion"])


@pytest.mark.parametrize("score_fn", list(SCORES))
def test_degree_of_scores(score_fn):
    x, y = np.random.default_rng(4).normal(size=(2, WIDTH))
    degree = teaching.SCORE_DEGREE[score_fn]
    np.testing.assert_allclose(SCORES[score_fn](3 * x, 3 * y), 3.0**degree * SCORES[score_fn](x, y))


# --- bad sizes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "width", "flag"),
    [
        ({}, 20, "--config.teacher.condensed_dim=20"),  # of 16 features
        ({"num_codes": 704}, 8, "--config.teacher.num_codes=704"),  # 38 items make 703 pairs
        ({"num_codes": 60, "num_pairs": 50}, 8, "--config.teacher.num_codes=60"),
    ],
)
def test_sizes_that_do_not_fit_name_their_flag(features, changes, width, flag):
    with pytest.raises(UserError, match=flag) as error:
        fit_teachers({"text": features}, make_settings(**changes), width)
    assert "text" in str(error.value) and "\n" not in str(error.value)


def test_width_is_limited_by_the_covered_items():
    few = make_features(num_items=12)  # 10 of them covered, 16 features
    with pytest.raises(UserError, match="at most 10"):
        fit_teachers({"text": few}, make_settings(), 12)


# --- cache -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path, features, fitted, monkeypatch):
    """A function settings -> (teacher, report) that fits with a cache, and the list of what was not in the cache."""
    calls = []

    def counted(*arguments):
        calls.append(arguments)
        return fitted

    def fit(features=features, width=WIDTH, **changes):
        teachers, reports = fit_teachers({"text": features}, make_settings(**changes), width, tmp_path / "new")
        return teachers["text"], reports["text"]

    monkeypatch.setattr(teaching, "fit_teacher", counted)
    return SimpleNamespace(fit=fit, calls=calls, folder=tmp_path / "new")


def test_the_second_call_reads_the_same_bits(cache):
    (first, report), (second, again) = cache.fit(), cache.fit()
    assert len(cache.calls) == 1 and len(list(cache.folder.iterdir())) == 1
    assert_same(first, second)
    assert [leaf.dtype for leaf in first] == [leaf.dtype for leaf in second]
    assert report == again


@pytest.mark.parametrize("damage", ["cut", "empty", "flipped", "foreign"])
def test_a_damaged_file_is_fitted_again(cache, damage):
    first, report = cache.fit()
    (file,) = cache.folder.iterdir()
    data = file.read_bytes()
    at = data.index(np.asarray(first.codebook).tobytes())
    flipped = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
    file.write_bytes({"cut": data[: len(data) // 2], "empty": b"", "flipped": flipped, "foreign": b"hello"}[damage])
    second, again = cache.fit()
    assert len(cache.calls) == 2 and report == again
    assert_same(first, second)
    cache.fit()
    assert len(cache.calls) == 2  # the file is whole again


def test_other_settings_features_or_width_are_other_files(cache, features):
    shifted = SimpleNamespace(values=features.values * 2, has_feature=features.has_feature)
    fewer = SimpleNamespace(values=features.values, has_feature=features.has_feature & (np.arange(41) != 7))
    for changes in ({}, {"seed": 1}, {"width": 4}, {"features": shifted}, {"features": fewer}):
        cache.fit(**changes)
    assert len(cache.calls) == len(list(cache.folder.iterdir())) == 5


def test_a_cache_that_cannot_be_written_does_no_harm(features, tmp_path, fitted):
    (tmp_path / "file").write_text("")
    teachers, _ = fit_teachers({"text": features}, make_settings(), WIDTH, tmp_path / "file" / "below")
    assert_same(teachers["text"], fitted[0])


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("KDSR_CACHE", raising=False)
    assert cache_folder() == tmp_path / "kdsr_jax"
    monkeypatch.setenv("KDSR_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"


@pytest.mark.parametrize("value", [1.0, 1e-15, 1e25])
def test_features_that_say_nothing_or_overflow_are_named(value):
    values = np.full((40, 16), value, np.float32)
    values[1:20] *= 1 if value == 1.0 else -1
    feature = SimpleNamespace(values=values, has_feature=np.arange(40) > 0)
    with pytest.raises(UserError, match="image features of all items are alike, or too small or too large"):
        teaching.check_features("image", feature, make_settings(num_codes=4), 8)
