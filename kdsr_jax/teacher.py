"""The teacher: what each modality says about pairs of items, fitted once from frozen features (paper Section 3.2).

Per modality: condensed features m~ and a codebook of correlation vectors. Scores and codes of a pair are computed from these
when they are needed, so nothing of size N x N exists.
"""

import contextlib
import functools
import hashlib
import json
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kdsr_jax.data.arrays import read_arrays
from kdsr_jax.errors import UserError
from kdsr_jax.files import replace_file
from kdsr_jax.models import autoencoder
from kdsr_jax.ops import quantize
from kdsr_jax.ops.correlation import split_scores
from kdsr_jax.ops.scoring import DISTANCES, SCORE_FNS, factored
from kdsr_jax.vq_fit import fit_ema, fit_joint
from kdsr_jax.workdir import TEACHER

SCORE_DEGREE = {"cosine": 0, "dot": 2, "euclidean": 1, "manhattan": 1}  # score(cx, cy) = c**degree * score(x, y)
KMEANS_ITERATIONS = 30
PAIRS_AT_ONCE = 2**16  # only a matter of memory
CACHE_VERSION = 3
LEAST_VARIANCE, MOST_VARIANCE = 1e-20, 1e30  # float32 products of smaller features vanish, of larger ones overflow


class Teacher(NamedTuple):
    """One modality's knowledge, a pytree.

    Attributes:
      condensed: [N + 1, width] float32, m~ at unit mean square over covered items; zero rows for padding and missing items.
      has_feature: [N + 1] bool.
      codebook: [x, D] float32 codewords.
    """

    condensed: jax.Array
    has_feature: jax.Array
    codebook: jax.Array


def pair_correlations(teacher, first, second, score_fn, num_splits):
    """State the holistic score and the dissected code of item pairs (T_s and T_c of Section 3.2).

    Args:
      teacher: Teacher.
      first, second: [P] int32 item ids.
      score_fn: a name of SCORE_FNS.
      num_splits: D.

    Returns:
      (scores [P] float32, codes [P] int32 from 0). Pairs with a missing item or padding hold values to be masked.
    """
    places = jnp.arange(len(first))
    return correlations_among(
        teacher, jnp.concatenate([first, second]), places, len(first) + places, score_fn, num_splits
    )


@functools.partial(jax.jit, static_argnames="score_fn")
def likeness_to(teacher, item, score_fn):
    """Return the holistic scores [N + 1] of all items with one, distances turned round: more is more alike."""
    scores = jax.vmap(SCORE_FNS[score_fn], (0, None))(teacher.condensed, teacher.condensed[item])
    return -scores if score_fn in DISTANCES else scores


def correlations_among(teacher, items, first, second, score_fn, num_splits):
    """Do as ``pair_correlations`` does for pairs of a few items, whose vectors are looked up and prepared once.

    Args:
      teacher: Teacher.
      items: [n] int32 item ids.
      first, second: [P] int32, the pairs as places in ``items``.
      score_fn, num_splits: as there.
    """
    of_one, of_pair = factored(score_fn)
    x = teacher.condensed[items]
    whole, parts = jax.vmap(of_one)(x), jax.vmap(jax.vmap(of_one))(x.reshape(len(items), num_splits, -1))
    scores = jax.vmap(of_pair)(whole[first], whole[second])
    vectors = jax.vmap(jax.vmap(of_pair))(parts[first], parts[second])
    return scores, quantize.nearest_codes(vectors, teacher.codebook)


def correlation_vectors(condensed, first, second, score_fn, num_splits):
    """Return the correlation vectors [P, D] of the pairs first, second [P] of rows of condensed [n, width], so many at a time."""

    def vector(pair):
        return split_scores(condensed[pair[0]], condensed[pair[1]], num_splits, SCORE_FNS[score_fn])

    return jax.lax.map(vector, (first, second), batch_size=PAIRS_AT_ONCE)


def fit_teachers(features, settings, width, cache_dir=None, codes=True, own=None):
    """Fit a teacher per modality, or read it from the cache.

    Args:
      features: dict modality -> object with ``values`` [N + 1, d_m] float32 and ``has_feature`` [N + 1] bool (numpy).
      settings: the config's teacher group (attributes).
      width: condensed_dim, at most min(d_m, covered items).
      cache_dir: folder of fitted teachers by fingerprint, or None.
      codes: False leaves the codebook empty, for runs that need the condensed features alone; vq_joint has one all the same.
      own: dict modality -> (Teacher, report) of what a run was begun with (``read_teachers``), which is taken as it is: fitted
        on another machine, a teacher has slightly other numbers, and some pairs other codes. None is none.

    Returns:
      (dict modality -> Teacher, dict modality -> report), the report a dict of plain numbers: reconstruction_error (share
      of the variance lost), chunk_variance (list of D) and, with codes, perplexity, distortion, used_codes.

    Raises:
      UserError: width or num_codes do not fit the features.
    """
    teachers, reports = {}, {}
    codes = codes or settings.quantizer == "vq_joint"  # which also shapes the condensed features
    for modality, feature in features.items():
        check_features(modality, feature, settings, width, codes)
        name = f"teacher-{_fingerprint(feature, settings, width, codes)}.npz"
        path = cache_dir and pathlib.Path(cache_dir) / name
        found = (own or {}).get(modality) or (path and _read_cache(path))
        with jax.default_matmul_precision("float32"):  # the same codes whatever the steps of training round to
            teachers[modality], reports[modality] = found or fit_teacher(feature, settings, width, codes)
        if path and not found:
            with contextlib.suppress(OSError):  # the cache only saves time
                _write_teacher(path, teachers[modality], reports[modality])
    return teachers, reports


def read_teachers(folder):
    """Return what ``keep_teachers`` kept in a folder, dict modality -> (Teacher, report)."""
    files = sorted(pathlib.Path(folder).glob(f"{TEACHER}*.npz"))
    return {file.stem.removeprefix(TEACHER): found for file in files if (found := _read_cache(file))}


def keep_teachers(folder, teachers, reports):
    """Write teachers into the folder of a run, a file a modality; those that are there and whole stay.

    Raises:
      UserError: they cannot be written.
    """
    for modality, teacher in teachers.items():
        path = pathlib.Path(folder) / f"{TEACHER}{modality}.npz"
        if not _read_cache(path):
            try:
                _write_teacher(path, teacher, reports[modality])
            except OSError as error:
                raise UserError(f"{path}: cannot be written ({error.strerror})") from error


def check_features(modality, feature, settings, width, codes=True):
    """Raise UserError where the features are too narrow, too few, too large or all alike for the settings."""
    covered, dim = int(feature.has_feature.sum()), feature.values.shape[1]
    if width > min(covered, dim):
        raise UserError(
            f"--config.teacher.condensed_dim={width}: {modality} has {dim} features of {covered} items, so at most "
            f"{min(covered, dim)} can be kept; set --config.teacher.condensed_dim (a divisible number) to that or less"
        )
    with np.errstate(over="ignore"):
        variance = feature.values[feature.has_feature].astype(np.float64).var(0).sum()
    if not LEAST_VARIANCE < variance < MOST_VARIANCE:
        raise UserError(
            f"--config.data.modalities: the {modality} features of all items are alike, or too small or too large (their variance is "
            f"{variance:g}); they say nothing about items, leave the modality out or scale the features"
        )
    pairs = covered * (covered - 1) // 2
    if codes and settings.num_codes > min(pairs, settings.num_pairs):
        raise UserError(
            f"--config.teacher.num_codes={settings.num_codes}: {modality} has only "
            f"{min(pairs, settings.num_pairs)} item pairs to learn codes from; lower it"
        )


def fit_teacher(feature, settings, width, codes=True):
    """Condense one modality's features, rotate, and fit its codebook; see ``fit_teachers``.

    With ``vq_joint`` features and codebook are trained together from the start that the other quantizers end with.
    """
    key = jax.random.key(settings.seed)
    condense_key, rotate_key, pair_key, code_key = jax.random.split(key, 4)
    covered = np.flatnonzero(feature.has_feature)
    x, variance = _centre(feature.values[covered])
    condensed, lost = _condense(x, settings, width, condense_key)
    condensed = _unit_mean_square(rotate(condensed, settings.rotation, settings.num_splits, rotate_key))
    report = {}
    codebook = np.zeros((0, settings.num_splits), np.float32)
    if codes:
        pairs = draw_pairs(pair_key, len(covered), settings.num_pairs)
        how = {name: getattr(settings, name) for name in ("quantizer", "num_codes", "score_fn", "num_splits")}
        condensed, codebook, lost, report = _fit_codes(code_key, x, condensed, lost, pairs, **how)
    report = {name: number.item() for name, number in report.items()}
    report["reconstruction_error"] = float(lost / variance)
    full = np.zeros((feature.values.shape[0], width), np.float32)
    full[covered] = condensed
    chunks = full[covered].reshape(len(covered), settings.num_splits, -1)
    report["chunk_variance"] = chunks.var(0).sum(-1).tolist()
    return Teacher(jnp.asarray(full), jnp.asarray(feature.has_feature), jnp.asarray(codebook)), report


@jax.jit
def _centre(x):
    """Return features about their mean, and their mean square."""
    x = x - x.mean(0, keepdims=True)
    return x, jnp.mean(x**2)


@functools.partial(jax.jit, static_argnames=("quantizer", "num_codes", "score_fn", "num_splits"))
def _fit_codes(key, x, condensed, lost, pairs, *, quantizer, num_codes, score_fn, num_splits):
    """Fit the codebook on pairs; returns (condensed, codebook, reconstruction error, report of the codes)."""
    score = score_fn, num_splits
    if quantizer == "vq_joint":
        condensed, codebook, lost = fit_joint(key, x, condensed, pairs, num_codes, *score)
        scale = 1 / jnp.sqrt(jnp.mean(condensed**2))
        condensed, codebook = condensed * scale, codebook * scale ** SCORE_DEGREE[score_fn]
    vectors = correlation_vectors(condensed, *pairs, *score)
    if quantizer == "vq":
        codebook = fit_ema(key, vectors, num_codes)
    elif quantizer == "kmeans":
        codebook = quantize.kmeans(key, vectors, num_codes, KMEANS_ITERATIONS)
    codes = quantize.nearest_codes(vectors, codebook)
    counts = jnp.bincount(codes, length=num_codes)
    report = {
        "perplexity": quantize.perplexity(counts),
        "distortion": jnp.mean(jnp.sum((vectors - codebook[codes]) ** 2, axis=1)),
        "used_codes": (counts > 0).sum(),
    }
    return condensed, codebook, lost, report


def draw_pairs(key, num_items, num_pairs):
    """Draw pairs i < j uniformly over 0..num_items-1; all of them where there are no more than num_pairs.

    Returns:
      (i, j): two int32 arrays of one length.
    """
    if num_items * (num_items - 1) // 2 <= num_pairs:
        i, j = np.triu_indices(num_items, 1)
        return jnp.asarray(i, jnp.int32), jnp.asarray(j, jnp.int32)
    return _random_pairs(key, num_items, num_pairs)


@functools.partial(jax.jit, static_argnames=("num_items", "num_pairs"))
def _random_pairs(key, num_items, num_pairs):
    first = jax.random.randint(key, (2, num_pairs), 0, jnp.array([[num_items], [num_items - 1]]))
    other = first[1] + (first[1] >= first[0])  # uniform over the items that are not the first one
    return jnp.minimum(first[0], other), jnp.maximum(first[0], other)


def _condense(x, settings, width, key):
    if settings.autoencoder == "pca":
        return autoencoder.pca(x, width)
    if settings.autoencoder == "sigmoid":
        return autoencoder.sigmoid(x, width, key)
    raw, orthonormal, lost = autoencoder.linear(x, width, key)
    return (raw if settings.rotation == "none" else orthonormal), lost


def rotate(code, rotation, num_splits, key):
    """Choose the axes of a condensed code, and with them what each of the D chunks holds.

    Args:
      code: [n, width] float32.
      rotation: "balanced": principal components, dealt to the chunks so that the products of their variances are balanced
        (the eigenvalue allocation of optimised product quantization); "random": a random rotation of the centred code;
        "none": the code as it is.
      num_splits: D, dividing width.
      key: a jax PRNG key, used by "random".

    Returns:
      [n, width] float32; "balanced" and "random" are centred and keep all distances.
    """
    if rotation == "none":
        return code
    code, _ = _centre(code)
    if rotation == "random":
        gaussian = jax.random.normal(key, (code.shape[1],) * 2)
        return code @ jnp.linalg.qr(gaussian)[0]
    variances, components = _principal(code)
    return components[:, balanced_order(np.asarray(variances), num_splits)]


@jax.jit
def _principal(code):
    """Return the variances of a centred code's principal components, and the code in them."""
    variances, vectors = jnp.linalg.eigh(code.T @ code / code.shape[0])
    return variances, code @ vectors


def balanced_order(variances, num_splits):
    """Deal components to chunks: the largest first, each to the chunk with room whose product of variances is smallest.

    Args:
      variances: [width] float, any order.
      num_splits: D, dividing width.

    Returns:
      [width] int order of the components, chunk after chunk.
    """
    room = len(variances) // num_splits
    logs = np.log(np.maximum(variances, 1e-12 * np.max(variances)))
    logs = logs - logs.min()  # every component adds, so an emptier chunk never has the larger product
    chunks, products = [[] for _ in range(num_splits)], np.zeros(num_splits)
    for component in np.argsort(-logs, kind="stable"):
        open_chunks = [c for c in range(num_splits) if len(chunks[c]) < room]
        chosen = min(open_chunks, key=lambda c: products[c])
        chunks[chosen].append(int(component))
        products[chosen] += logs[component]
    return np.concatenate(chunks)


@jax.jit
def _unit_mean_square(code):
    return code / jnp.sqrt(jnp.maximum(jnp.mean(code**2), 1e-30))


def _fingerprint(feature, settings, width, codes):
    what = [CACHE_VERSION, jax.default_backend(), width, codes, dict(settings.items())]
    digest = hashlib.sha256(json.dumps(what).encode())
    digest.update(np.ascontiguousarray(feature.values).tobytes())
    digest.update(np.ascontiguousarray(feature.has_feature).tobytes())
    return digest.hexdigest()[:24]


def _read_cache(path):
    try:
        arrays = read_arrays(path, (*Teacher._fields, "report"))
        report = json.loads(str(arrays.pop("report")))
    except (UserError, ValueError):
        return None  # absent or damaged: it is fitted and written again
    return Teacher(**{name: jnp.asarray(values) for name, values in arrays.items()}), report


def _write_teacher(path, teacher, report):
    arrays = {name: np.asarray(values) for name, values in teacher._asdict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, lambda file: np.savez(file, report=json.dumps(report), **arrays), shared=True)
