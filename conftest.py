"""What every test gets: names for the examples in docstrings, and a reason where an old package cannot do what is tested."""

import pytest
import tensordict
import torch
import transformers

import tdhook

# Tests that the oldest supported packages cannot pass (`make test-floor`), by what these lack.
TOO_OLD = {
    f"torch {torch.__version__} has no batching rule for fused attention, and names 1 / x otherwise": (
        not hasattr(torch.compiler, "is_compiling"),
        [
            "test_what_is_read_is_what_a_hook_sees[encoder]",
            "test_vmap_over_examples_is_the_loop[encoder]",
            "test_vmap_over_stacked_params_runs_several_models[attention]",
            "test_operators_and_functions_share_names",
        ],
    ),
    f"tensordict {tensordict.__version__} wraps the errors of its modules": (
        not hasattr(torch.compiler, "is_compiling"),
        ["test_nothing_is_changed_by_a_call_that_raises[tensordict_sequential]", "test_a_tensordict_is_addressed_by_key"],
    ),
    f"in transformers {transformers.__version__} blocks return tuples, at other addresses, and caches have no layers": (
        int(transformers.__version__.partition(".")[0]) < 5,
        [
            "test_hugging_face_models_record_what_they_offer_to_record",
            "test_a_model_that_returns_a_key_value_cache",
            "test_tail.py::test_under_vmap_over_values",
            "test_the_gradient_of_the_tail_is_the_gradient_at_the_site",
            "test_tracing.py::test_language_models[gpt2",
            "test_a_key_value_cache_is_left_as_it_is",
            "test_language_models_equal_one_hooked_forward_per_patch",
            "test_some_positions_also_counted_from_the_end",
            "test_activation_patching.py::test_named_inputs_with_a_mask",
            "test_activation_patching.py::test_whole_sites",
            "test_activation_patching.py::test_heads",
            "test_activation_patching.py::test_chunks_change_nothing",
            "test_activation_patching.py::test_inside_a_transformed_model",
            "test_patches_that_are_skipped_have_the_same_numbers",
            "test_activation_patching.py::test_nothing_of_the_caller_is_changed",
            "test_activation_patching.py::test_without_gradients",
            "test_patching_smollm2_equals_hooks",
            "test_integrated_gradients_at_the_embedding_of_smollm2_equal_captum",
        ],
    ),
}


@pytest.fixture(autouse=True)
def _doctest_names(doctest_namespace: dict) -> None:
    doctest_namespace.update(torch=torch, tdhook=tdhook)
    torch.manual_seed(0)  # a test that fails by chance is of no use to anybody


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if not hasattr(torch.compiler, "is_compiling") and item.get_closest_marker("compile"):
            item.add_marker(pytest.mark.skip(reason=f"torch {torch.__version__} cannot compile over torch.func transforms"))
        for reason, (lacking, names) in TOO_OLD.items():
            if lacking and any(name in item.nodeid for name in names):
                item.add_marker(pytest.mark.skip(reason=reason))
