"""The bugs that users of other systems met, and the tests that keep each of them out of this one.

The numbers are those of the bug list of the peer survey, section 3: masking and tokenisation (1-9),
losses and log-probs (10-20), KL, PPO and reward models (21-31), resuming (33, 34), memory and speed
(36, 37), packing (44), the denominators of DAPO (49). Where a bug cannot happen here by construction,
its line says why, and names the test that is closest to it.
"""

import ast
import functools
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]

CHAT, PIPELINE = "tests/data/chat_test.py", "tests/data/pipeline_test.py"
TRANSCRIPTS, RECORDS = "tests/data/transcripts_test.py", "tests/data/records_test.py"
OBJECTIVES, STEP = "tests/training/objectives_test.py", "tests/training/step_test.py"
PREFERENCE, POLICY = "tests/losses/preference_test.py", "tests/losses/policy_test.py"
KL, MASKED = "tests/losses/kl_test.py", "tests/losses/masked_test.py"
DECODE, HEADS = "tests/sampling/decode_test.py", "tests/models/heads_test.py"
CHUNKS = "tests/models/chunks_test.py"
ENGINE, ADVANTAGES, GRADIENT, REWARDS, ROLLOUTS, SHAPING = (
  f"tests/rl/{name}_test.py"
  for name in ("engine", "advantages", "policy_gradient", "rewards", "rollouts", "shaping")
)
ONLINE = "tests/phases/online_test.py"
CACHE = "tests/phases/reference_test.py"
TRANSFORMER = "tests/models/transformer_test.py::TestForward"

BUGS = {
  1: (
    "fine-tuning never teaches the model to stop, since its EOS is masked together with a padding "
    "of the same id",
    (
      f"{CHAT}::test_eos_is_response_also_where_it_is_the_padding",
      f"{PIPELINE}::test_padding_with_the_eos_moves_no_mask",
      f"{OBJECTIVES}::test_only_response_tokens_are_predicted",
    ),
  ),
  2: (
    "the same in every other kind of batch: masks made by comparing ids lose real tokens",
    (
      f"{PIPELINE}::test_padding_with_the_eos_moves_no_mask",
      f"{DECODE}::test_pad_equal_to_eos_changes_nothing_but_the_padding",
    ),
  ),
  3: (
    "PPO looks up scores and values at the wrong token where padding and EOS are one id",
    (
      f"{PIPELINE}::test_the_last_response_token_is_found_by_length",
      f"{OBJECTIVES}::test_score_is_read_at_the_last_response_token",
      f"{ROLLOUTS}::test_segments_and_masks_go_by_length_though_the_padding_is_an_eos",
      f"{REWARDS}::test_padding_that_is_the_eos_does_not_move_the_reading",
    ),
  ),
  4: (
    "preference data in chat form gets a second EOS after its turn end",
    (
      f"{CHAT}::test_eos_is_appended_only_where_no_turn_end_is_written",
      f"{CHAT}::test_literal_text_has_one_eos_even_if_it_brings_its_own",
    ),
  ),
  5: (
    "the border of prompt and completion is off by what the template adds to ask for an answer",
    (
      f"{CHAT}::test_multi_turn_mask_is_the_hand_written_one",
      f"{CHAT}::test_every_template_says_its_turns_and_keeps_the_prompt",
      f"{CHAT}::test_an_answer_that_merges_with_its_prompt_is_tokenised_apart",
      f"{OBJECTIVES}::test_only_response_tokens_are_predicted",
    ),
  ),
  6: (
    "packing forgets the mask, and prompts are trained on",
    (
      f"{PIPELINE}::test_packed_tokens_are_the_unpacked_ones",
      f"{OBJECTIVES}::test_packed_loss_and_gradient_are_the_unpacked_ones",
    ),
  ),
  7: (
    "a template call returns a mapping of two entries, and 2 is taken for the length of the prompt",
    (f"{CHAT}::test_types_of_the_template_are_pinned",),
  ),
  8: (
    "tokenizer and template both write a BOS",
    (
      f"{CHAT}::test_exactly_one_bos",
      f"{CHAT}::test_literal_prompt_gets_the_bos_its_tokenizer_leads_with",
    ),
  ),
  9: (
    "transcripts are split at another turn than the last answer, or keep the prompt in the answers",
    (
      f"{TRANSCRIPTS}::test_implicit_prompt_is_split_at_the_last_assistant",
      f"{TRANSCRIPTS}::test_answers_that_begin_alike_are_whole",
      f"{RECORDS}::test_a_prompt_repeated_in_both_answers_is_taken_off",
    ),
  ),
  10: (
    "DPO multiplies by beta twice",
    (f"{PREFERENCE}::test_golden_pair", f"{OBJECTIVES}::test_beta_is_applied_once"),
  ),
  11: (
    "broken borders of packed pairs make DPO start at a multiple of ln 2; here pairs are padded, "
    "never packed, and a run whose first loss is not that of its objective stops",
    (
      f"{OBJECTIVES}::test_step_zero_identities",
      f"{STEP}::test_padding_and_weightless_rows_change_nothing",
      "tests/phases/preference_test.py::test_a_run_that_does_not_start_at_its_reference_is_stopped",
      "tests/training/loop_test.py::test_the_first_step_is_checked_and_no_other",
    ),
  ),
  12: (
    "policy and reference differ before any training, because of sharding or of the batch",
    (
      f"{OBJECTIVES}::test_lora_at_birth_is_its_own_reference",
      f"{STEP}::test_the_policy_is_its_reference_on_the_mesh",
      f"{ENGINE}::test_lora_on_eight_devices_starts_where_full_weights_on_one_do",
    ),
  ),
  13: (
    "dropout stays on in policy or reference; here no module has any, and a forward pass takes no "
    "random key",
    (f"{OBJECTIVES}::test_the_random_stream_changes_nothing",),
  ),
  14: (
    "a reference in half precision shifts the rewards; here one module computes both, and no "
    "setting gives the reference a type of its own",
    (f"{OBJECTIVES}::test_half_precision_does_not_part_policy_and_reference",),
  ),
  15: (
    "IPO averages where it should sum, or the reverse, and an empty response divides by zero; here "
    "log-probs of a response are sums throughout",
    (
      f"{PREFERENCE}::test_formulas_against_numpy",
      f"{OBJECTIVES}::test_empty_response_is_finite",
      f"{OBJECTIVES}::test_empty_rows_leave_every_gradient_finite",
      f"{MASKED}::test_empty_mask_is_zero",
    ),
  ),
  16: (
    "an option of the loss is silently ignored",
    (
      f"{OBJECTIVES}::test_no_setting_is_ignored",
      "tests/config_test.py::test_every_mistake_names_its_field",
    ),
  ),
  17: (
    "log-probs change with the side or the amount of padding",
    (
      f"{OBJECTIVES}::test_padding_side_amount_and_content_change_nothing",
      f"{STEP}::test_padding_and_weightless_rows_change_nothing",
      f"{PIPELINE}::test_more_padding_changes_no_token_and_no_mask",
      f"{TRANSFORMER}::test_padding_is_never_seen",
    ),
  ),
  18: (
    "trainer and sampler disagree about the log-probs of one sequence, and nobody looks",
    (
      f"{DECODE}::test_logprobs_are_the_trainers",
      f"{ROLLOUTS}::test_the_trainers_logprobs_are_the_samplers",
      f"{ENGINE}::test_sampler_and_trainer_agree_all_along",
      f"{ENGINE}::test_identity_check_stops_a_run",
    ),
  ),
  19: (
    "log-probs are recomputed without the temperature or truncation they were sampled with; here "
    "rollouts have no truncation to forget",
    (
      f"{ROLLOUTS}::test_the_trainers_logprobs_are_the_samplers",
      f"{DECODE}::test_logprobs_are_those_of_the_truncated_distribution",
      f"{HEADS}::test_logprobs_and_entropy",
    ),
  ),
  20: (
    "gradient accumulation averages averages, and so scales the loss wrongly",
    (
      f"{STEP}::test_accumulation_of_parts_that_weigh_differently_changes_nothing",
      f"{STEP}::test_accumulation_changes_nothing",
      f"{GRADIENT}::test_accumulation_over_responses_of_different_lengths_changes_nothing",
      f"{MASKED}::test_mean_is_exact_under_uneven_accumulation",
    ),
  ),
  21: (
    "the reported KL is negative, from padding, sampling settings or the estimator",
    (
      f"{KL}::test_k3_is_never_negative_and_k1_may_be",
      f"{KL}::test_k1_and_k3_are_unbiased_and_k2_is_not",
      f"{ENGINE}::test_the_score_rises_and_the_kl_is_reported",
      f"{ROLLOUTS}::test_nothing_is_there_off_the_mask",
    ),
  ),
  22: (
    "the KL that is reported is another than the one that is trained on",
    (
      f"{ADVANTAGES}::test_the_reported_kl_is_the_one_that_is_paid",
      f"{POLICY}::test_the_sum_of_shaped_rewards_is_score_minus_kl",
    ),
  ),
  23: (
    "k3 inside a loss has the gradient of the forward KL; here PPO's KL is k1 in the reward",
    (
      f"{KL}::test_which_estimator_has_which_gradient",
      f"{POLICY}::test_the_kl_in_the_reward_carries_no_gradient",
      "tests/losses/policy_gradient_exact_test.py::test_the_kl_loss_has_the_value_asked_for_and_"
      "the_gradient_of_the_reverse_kl",
    ),
  ),
  24: (
    "the score is paid on a padding token instead of on the last token of the response",
    (
      f"{POLICY}::test_score_lands_on_the_last_sampled_token",
      f"{ADVANTAGES}::test_gae_of_shaped_rewards_and_its_whitening",
    ),
  ),
  25: (
    "sentinels and padding leak into entropies, metrics and advantages",
    (
      f"{ADVANTAGES}::test_padding_and_empty_responses_leak_into_nothing",
      f"{POLICY}::test_nothing_off_the_mask_is_read",
      f"{MASKED}::test_masked_out_values_never_leak",
    ),
  ),
  26: (
    "advantages are discounted through tokens that the environment wrote",
    (f"{POLICY}::test_gae_passes_through_holes_as_if_they_were_cut_out",),
  ),
  27: (
    "a sample without any action turns the batch into NaN",
    (
      f"{POLICY}::test_empty_responses_give_zeros",
      f"{ADVANTAGES}::test_padding_and_empty_responses_leak_into_nothing",
      f"{OBJECTIVES}::test_empty_rows_leave_every_gradient_finite",
    ),
  ),
  28: (
    "rewards are normalised before responses without an EOS are punished",
    (f"{SHAPING}::test_the_order_is_penalty_then_normalise_then_clip",),
  ),
  29: (
    "a reward model without a padding id reads the wrong last token",
    (
      f"{REWARDS}::test_a_reward_model_is_read_at_the_last_response_token",
      f"{REWARDS}::test_a_score_depends_neither_on_its_batch_nor_on_noise_in_the_padding",
      f"{OBJECTIVES}::test_padding_side_amount_and_content_change_nothing",
    ),
  ),
  30: (
    "a reward model's scores depend on the batch they are computed in",
    (
      f"{REWARDS}::test_a_score_depends_neither_on_its_batch_nor_on_noise_in_the_padding",
      f"{OBJECTIVES}::test_score_is_read_at_the_last_response_token",
    ),
  ),
  31: (
    "KTO estimates its KL from one example, or from a part of the batch",
    (
      "tests/losses/unpaired_test.py::test_wrong_arguments_are_refused",
      f"{PIPELINE}::test_options_that_do_not_go_together_are_refused",
      f"{OBJECTIVES}::test_kto_baseline_is_that_of_the_whole_batch",
      f"{STEP}::test_accumulation_of_parts_that_weigh_differently_changes_nothing",
    ),
  ),
  33: (
    "after a resume data is repeated or skipped, or the optimizer starts afresh",
    (f"{ONLINE}::test_a_killed_run_resumes_bit_exactly",),
  ),
  34: (
    "PPO cannot resume: value model, KL controller, random numbers",
    (
      f"{ONLINE}::test_a_killed_run_resumes_bit_exactly",
      f"{ENGINE}::test_a_run_resumed_from_its_state_is_bit_exact",
    ),
  ),
  36: (
    "the logits of all positions are held at once, in float32",
    (
      f"{CHUNKS}::test_chunks_behind_the_count_are_not_computed",
      f"{OBJECTIVES}::test_chunked_head_changes_nothing",
    ),
  ),
  37: (
    "cached log-probs of the reference are those of another model, or of other data",
    (
      f"{CACHE}::test_what_the_numbers_could_depend_on_names_the_folder",
      f"{CACHE}::test_values_of_other_weights_are_refused",
      f"{CACHE}::test_a_loss_from_the_cache_is_the_recomputed_one",
    ),
  ),
  44: (
    "documents packed into one row, or answers to one prompt, see each other",
    (
      f"{OBJECTIVES}::test_a_neighbour_in_the_row_is_never_seen",
      "tests/models/branches_test.py::test_a_row_that_forks_equals_a_row_for_each_answer",
    ),
  ),
  49: (
    "nobody knows what DAPO divides by, and the sampler's own policy is not corrected for",
    (
      f"{GRADIENT}::test_the_loss_is_the_formula_averaged_as_asked",
      f"{GRADIENT}::test_the_others_point_elsewhere",
      f"{ADVANTAGES}::test_importance_weights_by_name",
    ),
  ),
}


@functools.cache
def functions_of(path):
  """Names of the test functions of a file, those of a class as Class::name."""
  names = set()
  for node in ast.parse((ROOT / path).read_text()).body:
    if isinstance(node, ast.FunctionDef):
      names.add(node.name)
    elif isinstance(node, ast.ClassDef):
      names |= {f"{node.name}::{f.name}" for f in node.body if isinstance(f, ast.FunctionDef)}
  return {name for name in names if name.rpartition("::")[2].startswith("test_")}


def test_every_bug_is_listed_and_described():
  assert list(BUGS) == [*range(1, 32), 33, 34, 36, 37, 44, 49]
  assert all(line and tests for line, tests in BUGS.values())
  assert len({line for line, _ in BUGS.values()}) == len(BUGS)


@pytest.mark.parametrize("number", BUGS)
def test_its_tests_exist(number):
  for name in BUGS[number][1]:
    path, _, function = name.partition("::")
    assert function in functions_of(path), f"bug {number}: there is no {name}"
