"""The planted shop: its truth is what the simulated log shows, and its features show what they should."""

import dataclasses
import hashlib
import json
import tracemalloc
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from configs import default
from kdsr_jax.data.interactions import build_interactions, train_lengths
from kdsr_jax.data.sources import planted, planted_kernel
from kdsr_jax.data.sources.planted import FACETS, MODALITY_FACETS, RELATIONS, feature_blocks, icon
from kdsr_jax.data.sources.planted_kernel import HABITS


def make_shop(**changes):
    """Generate the default shop, or one that differs in some settings."""
    return planted.generate(**default.get_config().data.planted.to_dict() | changes)


@pytest.fixture(scope="module")
def shop():
    return make_shop()


@pytest.fixture(scope="module")
def interactions(shop):
    return build_interactions(shop.log, 5)


def _codes(shop, modality, facet):
    """Return features and the facet's values of the items that have the modality."""
    item_ids, features = shop.raw_features[modality]
    return features, shop.facets[shop.index(item_ids), list(FACETS).index(facet)]


def _accuracy_of_linear_decoder(features, values):
    """Fit one ridge regression a value on two thirds of the items; return accuracy on the others and chance."""
    one_hot = np.eye(values.max() + 1)[values]
    train = np.arange(len(values)) % 3 > 0
    x = np.concatenate([features, np.ones((len(features), 1))], axis=1).astype(np.float64)
    weights = np.linalg.solve(x[train].T @ x[train] + np.eye(x.shape[1]), x[train].T @ one_hot[train])
    return ((x[~train] @ weights).argmax(1) == values[~train]).mean(), 1 / one_hot.shape[1], (~train).sum()


def test_same_seed_gives_the_same_shop_and_another_seed_another():
    first, again, other = (make_shop(num_users=60, num_items=40, seed=seed) for seed in (3, 3, 4))
    for name in ("user_codes", "item_codes", "user_names", "item_names", "timestamps"):
        np.testing.assert_array_equal(getattr(first.log, name), getattr(again.log, name))
    for modality in MODALITY_FACETS:
        np.testing.assert_array_equal(first.raw_features[modality][1], again.raw_features[modality][1])
    assert first.items == again.items
    assert not np.array_equal(first.facets, other.facets)


def test_settings_of_the_features_leave_the_log_alone():
    one = make_shop(num_users=60, num_items=40)
    two = make_shop(num_users=60, num_items=40, entanglement=1.0, noise=1.0, missing_rate=0.5, feature_dim=16)
    np.testing.assert_array_equal(one.log.item_codes, two.log.item_codes)
    np.testing.assert_array_equal(one.log.timestamps, two.log.timestamps)


def test_default_shop_survives_the_core_and_has_the_promised_size(shop, interactions):
    assert len(shop.log.user_names) == 1200 and len(shop.items) == 600
    assert interactions.num_users >= 1190 and interactions.num_items >= 590
    assert interactions.lengths.mean() == pytest.approx(12.0, abs=0.6)
    assert len(interactions.items) >= 0.99 * len(shop.log.item_codes)
    assert shop.log.user_names[6] == "u0007" and shop.log.item_names[122] == "i0123"


def test_order_of_time_is_the_order_of_the_walk(shop):
    """No user does two things at once, and the log is in order of time."""
    assert (np.diff(shop.log.timestamps) >= 0).all()
    pairs = np.stack([shop.log.user_codes, shop.log.timestamps], 1)
    assert len(np.unique(pairs, axis=0)) == len(pairs)


@pytest.mark.parametrize("cold_rate, missing_rate", [(0.0, 0.0), (0.1, 0.25)])
def test_cold_and_missing_rates_are_kept(cold_rate, missing_rate):
    shop = make_shop(num_users=300, num_items=200, cold_rate=cold_rate, missing_rate=missing_rate)
    interactions = build_interactions(shop.log, 1)
    cold = shop.kernel.cold
    assert cold.sum() == round(cold_rate * 200)
    for item_ids, features in shop.raw_features.values():
        assert len(item_ids) == len(features) == 200 - round(missing_rate * 200)
        assert features.dtype == np.float32 and np.isfinite(features).all()
        assert np.isin(shop.item_ids[cold], item_ids).all()
    taken_cold = cold[shop.index(interactions.item_ids[1:])][interactions.items - 1]
    positions = np.arange(len(interactions.items)) - np.repeat(interactions.offsets[:-1], interactions.lengths)
    train = positions < np.repeat(train_lengths(interactions.lengths), interactions.lengths)
    assert not taken_cold[train].any()
    assert taken_cold[~train].any() == (cold_rate > 0)


def test_cold_items_outlast_the_core(shop, interactions):
    kept = np.isin(shop.item_ids[shop.kernel.cold], interactions.item_ids)
    assert kept.mean() > 0.8


def test_relation_is_symmetric_and_means_what_its_name_says(shop):
    everything = np.arange(200)
    relations = shop.relation(everything[:, None], everything)
    np.testing.assert_array_equal(relations, relations.T)
    same = shop.facets[everything, None] == shop.facets[everything]
    shape, colour, pattern, brand = np.moveaxis(same, -1, 0)
    expected = {
        "same shape and colour": shape & colour,
        "same colour, other shape": colour & ~shape,
        "same shape, other colour": shape & ~colour,
        "same brand, other shape and colour": brand & ~shape & ~colour,
        "same pattern, other shape, colour and brand": pattern & ~shape & ~colour & ~brand,
    }
    for kind, name in enumerate(RELATIONS):
        np.testing.assert_array_equal(relations == kind, expected.get(name, ~np.any(list(expected.values()), axis=0)))


def test_next_item_probabilities_are_distributions(shop):
    histories = [[], [5], [5, 9, 12], list(range(30))]
    after, before = shop.next_item_probabilities(histories), shop.next_item_probabilities(histories, [99] * 4)
    for probabilities in (after, before):
        np.testing.assert_allclose(probabilities.sum(1), 1.0, rtol=1e-12)
        assert (probabilities >= 0).all()
    assert (after > 0).all()
    np.testing.assert_array_equal(before > 0, np.broadcast_to(~shop.kernel.cold, before.shape))


def test_closed_form_is_what_the_definition_says(shop):
    """One transition by hand: Bayes over the habits, then the mixture over relations, item by item."""
    first, second = 10, 20
    weights = np.where(shop.kernel.cold, 0.0, shop.kernel.weights)

    def row(item, habit):
        kinds = np.array([shop.relation(item, other) for other in range(600)])
        result = (1 - HABITS[habit].sum()) * weights / weights.sum()
        for kind in range(1, len(RELATIONS)):
            inside = np.where(kinds == kind, weights, 0.0)
            if inside.sum() > 0:
                result += HABITS[habit, kind] * inside / inside.sum()
            else:
                result += HABITS[habit, kind] * weights / weights.sum()
        return result

    odds = np.array([row(first, habit)[second] for habit in range(len(HABITS))])
    expected = sum(odds[habit] / odds.sum() * row(second, habit) for habit in range(len(HABITS)))
    np.testing.assert_allclose(shop.next_item_probabilities([[first, second]], [99])[0], expected, rtol=1e-9)


@pytest.mark.parametrize("way", ["ladder", "shelves"])
def test_simulated_steps_follow_the_kernel(shop, monkeypatch, way):
    """Chi-square of 20,000 simulated second items after each of three habits' most popular first items."""
    monkeypatch.setattr(planted_kernel, "_LADDER", 600 if way == "ladder" else 599)
    rng, draws = np.random.default_rng(0), 20_000
    for habit in range(len(HABITS)):
        lengths, launch = np.full(draws, 2), np.full(draws, 9)
        histories = shop.kernel.simulate(rng, np.full(draws, habit), lengths, launch).reshape(draws, 2)
        first = np.bincount(histories[:, 0]).argmax()
        seconds = np.bincount(histories[histories[:, 0] == first, 1], minlength=600)
        law = shop.kernel.probabilities(np.array([first]), np.array([False]), HABITS[habit])[0]
        relations = shop.relation(first, np.arange(600))
        observed, expected = (np.bincount(relations, part, len(RELATIONS)) for part in (seconds, seconds.sum() * law))
        held = expected > 5
        chi_square = (np.square(observed - expected)[held] / expected[held]).sum()
        assert chi_square < 25  # beyond the 99.98th percentile at 6 degrees of freedom
        starts = np.bincount(histories[:, 0], minlength=600)
        law = draws * shop.kernel.on_sale[0] / shop.kernel.on_sale[0].sum()
        sold = law > 0
        assert (np.square(starts - law)[sold] / law[sold]).sum() < 588 + 5 * np.sqrt(2 * 588)
        assert starts[~sold].sum() == 0


def test_what_is_drawn_from_shelves_is_as_popular_as_it_should_be(shop):
    """Item by item: the relation's items in proportion to their popularity, and none else; cold ones after the launch."""
    rng, last = np.random.default_rng(0), np.full(30_000, 11)
    for launch, kind in np.ndindex(2, len(RELATIONS)):
        drawn = np.bincount(shop.kernel.shelves[launch].draw(rng, kind, last), minlength=600)
        law = shop.kernel.on_sale[launch] * ((shop.relation(11, np.arange(600)) == kind) | (kind == 0))
        assert (drawn[law == 0] == 0).all() and drawn.sum() == len(last)
        expected = law[law > 0] / law.sum() * len(last)
        assert (np.square(drawn[law > 0] - expected) / expected).sum() < len(expected) + 5 * np.sqrt(2 * len(expected))


def test_popularity_in_each_relation_is_that_of_all_pairs(shop):
    relations = shop.relation(np.arange(600)[:, None], np.arange(600))
    for kind in range(1, len(RELATIONS)):
        expected = shop.kernel.on_sale @ (relations == kind).T
        np.testing.assert_allclose(shop.kernel.mass[:, :-1, kind], expected, rtol=1e-12)
        np.testing.assert_array_equal(shop.kernel.mass[:, :-1, kind] > 0, expected > 0)
    assert not shop.kernel.mass[:, -1].any()


def test_the_log_of_the_default_shop_is_known_to_the_bit(shop):
    digest = hashlib.sha256(json.dumps(shop.items).encode())
    for column in dataclasses.astuple(shop.log):
        digest.update(column.tobytes())
    assert digest.hexdigest().startswith("4929998348d5065f")


def test_a_large_shop_needs_no_table_of_pairs():
    tracemalloc.start()
    shop = make_shop(num_users=500, num_items=100_000, feature_dim=8, mean_length=8.0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 400e6 < 100_000**2 / 8  # bytes; even a bit a pair would be more
    interactions = build_interactions(shop.log, 1)
    assert interactions.lengths.min() == 6 and (np.diff(interactions.timestamps)[:5] > 0).all()
    popularity = shop.popularity_hit_rates(interactions, topk=(100_000,))
    assert popularity["hr@100000"] == 100.0


def test_oracle_and_ranks_agree_with_the_distribution_of_each_history(shop, interactions):
    """The pass over all test instances gives what asking for single histories gives."""
    topk = (5, 10, 20)
    ranks, expected = shop.oracle_ranks(interactions, topk)
    catalogue = shop.index(interactions.item_ids[1:])
    train, instance = train_lengths(interactions.lengths), 0
    for user in range(20):
        history = catalogue[interactions.items[interactions.offsets[user] : interactions.offsets[user + 1]] - 1]
        for end in range(train[user], len(history)):
            law = shop.next_item_probabilities([history[:end]], [train[user]])[0][catalogue]
            target = interactions.items[interactions.offsets[user] + end] - 1
            assert ranks[instance] == (law >= law[target]).sum()
            best = np.sort(law)[::-1].cumsum()[np.array(topk) - 1] / law.sum()
            np.testing.assert_allclose(expected[instance], best, rtol=1e-9)
            instance += 1


def test_oracle_hits_as_often_as_it_expects(shop, interactions):
    topk = (5, 10, 20)
    ranks, expected = shop.oracle_ranks(interactions, topk)
    assert len(ranks) == (interactions.lengths - train_lengths(interactions.lengths)).sum()
    for k, chance in zip(topk, expected.T, strict=True):
        standard_error = np.sqrt((chance * (1 - chance)).sum()) / len(ranks)
        assert abs((ranks <= k).mean() - chance.mean()) < 4 * standard_error
        assert shop.oracle_hit_rates(interactions)[f"hr@{k}"] == pytest.approx(100 * (ranks <= k).mean())


def test_oracle_is_far_above_popularity(shop, interactions):
    oracle, popularity = shop.oracle_hit_rates(interactions), shop.popularity_hit_rates(interactions)
    assert oracle.keys() == popularity.keys() == {"hr@5", "hr@10", "hr@20"}
    assert all(oracle[name] > 3.5 * popularity[name] for name in oracle)
    assert 50 < oracle["hr@20"] < 65 and 5 < popularity["hr@20"] < 15


@pytest.mark.parametrize("modality", MODALITY_FACETS)
@pytest.mark.parametrize("entanglement", [0.0, 1.0])
def test_modalities_see_their_facets_and_no_others(modality, entanglement):
    shop = make_shop(num_users=10, num_items=900, entanglement=entanglement)
    for facet in FACETS:
        accuracy, chance, trials = _accuracy_of_linear_decoder(*_codes(shop, modality, facet))
        if facet in MODALITY_FACETS[modality]:
            assert accuracy > 0.95
        else:
            assert accuracy < chance + 4 * np.sqrt(chance * (1 - chance) / trials)


def test_every_facet_is_seen_by_some_modality_and_none_sees_all():
    assert set().union(*MODALITY_FACETS.values()) == set(FACETS)
    assert all(set(seen) < set(FACETS) for seen in MODALITY_FACETS.values())


@pytest.mark.parametrize("modality", MODALITY_FACETS)
def test_entanglement_goes_from_separate_blocks_to_a_full_rotation(modality):
    """Where the facet blocks are separate, a facet's means by value have no energy outside its own block."""
    leaks = []
    for entanglement in (0.0, 0.5, 1.0):
        shop = make_shop(num_users=10, num_items=900, entanglement=entanglement, missing_rate=0.0)
        leak = []
        for facet, block in feature_blocks(modality, 64).items():
            features, values = _codes(shop, modality, facet)
            means = np.stack([features[values == value].mean(0) for value in range(values.max() + 1)])
            energy = np.square(means - means.mean(0)).sum(0)
            leak.append(1 - energy[block].sum() / energy.sum())
        leaks.append(np.mean(leak))
    assert leaks[0] < 0.06
    assert 0.15 < leaks[1] < leaks[2]
    assert leaks[2] > 0.4


def test_blocks_between_facets_are_uncorrelated_at_entanglement_zero():
    shop = make_shop(num_users=10, num_items=900, entanglement=0.0, missing_rate=0.0)
    for modality in MODALITY_FACETS:
        correlation = np.corrcoef(shop.raw_features[modality][1].T)
        blocks = list(feature_blocks(modality, 64).values())
        for one in blocks:
            for other in blocks:
                if one != other:
                    assert np.sqrt(np.square(correlation[one, other]).mean()) < 1.3 / np.sqrt(900)


def test_feature_blocks_cover_the_vector_and_end_at_the_splits():
    for modality in MODALITY_FACETS:
        for feature_dim in (8, 20, 64, 100):
            covered = np.concatenate([np.r_[block] for block in feature_blocks(modality, feature_dim).values()])
            np.testing.assert_array_equal(covered, np.arange(feature_dim))
        assert all(block.stop % 8 == 0 for block in feature_blocks(modality, 64).values())


@pytest.mark.parametrize("noise", [0.0, 0.3, 1.0])
def test_noise_is_the_standard_deviation_around_a_signal_of_one(noise):
    shop = make_shop(num_users=10, num_items=900, noise=noise)
    for _, features in shop.raw_features.values():
        assert np.square(features).mean() == pytest.approx(1 + noise**2, rel=0.05)


def test_index_finds_raw_ids_and_refuses_others(shop):
    np.testing.assert_array_equal(shop.index(["i0600", "", "i0001", "x", "i9999"]), [599, -1, 0, -1, -1])


def test_metadata_names_the_facets(shop):
    for number in (0, 17, 599):
        item = shop.items[number]
        assert item["item_id"] == shop.item_ids[number]
        assert [FACETS[name].index(item[name]) for name in FACETS] == shop.facets[number].tolist()
        assert item["title"] == f"{item['brand']} {item['shape']}"


def test_icons_are_small_well_formed_and_show_every_facet(shop):
    for item in shop.items:
        drawing = icon(item)
        assert len(drawing.encode()) < 1000
        assert ET.fromstring(drawing).tag == "{http://www.w3.org/2000/svg}svg"
    plain = dict(shop.items[0], title="")
    for facet, values in FACETS.items():
        drawings = {icon(plain | {facet: value}) for value in values}
        assert len(drawings) == len(values)
