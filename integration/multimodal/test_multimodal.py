"""The recipes for images, on tiny random models with real processors, images and trainers."""

import pytest


@pytest.fixture(scope="module")
def driven(env_python, run_json, project_path, tmp_path_factory):
    """What drive.py found. The environment of Axolotl is one that has Pillow."""
    script, work = "integration/multimodal/drive.py", tmp_path_factory.mktemp("multimodal")
    environment = {"PYTHONPATH": project_path, "OMP_NUM_THREADS": 1}
    return run_json(env_python("axolotl"), script, work, **environment)


@pytest.mark.parametrize("name", ["vision_language", "image_classifier"])
def test_the_merge_is_what_was_trained_from_files_and_in_memory(driven, name):
    found = driven[name]
    assert found["moved"] and found["equal"]
    assert found["differing"] == []
    assert found["losses"][-1] < found["losses"][0]


def test_the_vision_tower_stays_dense(driven):
    found = driven["vision_language"]
    assert found["pixels"] == [1, 1, 3, 32, 32]
    assert len(found["layers"]) == 14
    assert all(".text_model.layers." in name for name in found["layers"])


def test_exports_hold_the_model_or_name_what_they_cannot(driven):
    found = driven["vision_language"]["exports"]
    assert found["torchao"] == 14
    for name in ("gguf", "mlx"):
        assert "'idefics3'" in found[name]
    for name in ("gptq", "compressed-tensors"):
        assert "zero-points are not integers" in found[name]
    assert "adapt='both' changes scales" in found["lora"]


def test_the_new_head_and_its_labels_are_in_the_merged_classifier(driven):
    found = driven["image_classifier"]
    assert found["class"] == "ViTForImageClassification"
    assert found["labels"] == {"0": "bright", "1": "dark"}
    assert len(found["layers"]) == 12
