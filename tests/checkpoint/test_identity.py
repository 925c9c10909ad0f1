"""An adapter belongs to the base that it was trained on."""

import dataclasses

import pytest

from qalora_plugin.checkpoint.identity import BaseIdentity

BASE = BaseIdentity(bits=4, group_size=32, fingerprint="f", base_merged=None)


@pytest.mark.parametrize(
    ("changes", "different"),
    [
        ({}, None),
        ({"bits": 3}, "bits"),
        ({"group_size": -1}, "group_size"),
        ({"fingerprint": "g"}, "fingerprint"),
        ({"base_merged": {"adapter": "first"}}, "base_merged"),
        ({"bits": None, "group_size": None, "fingerprint": None}, None),
        ({"bits": 3, "base_merged": {"adapter": "first"}}, "base_merged"),
    ],
)
def test_first_field_that_differs(changes, different):
    other = dataclasses.replace(BASE, **changes)
    assert other.difference(BASE) == different
    assert BASE.difference(other) == different
