"""Which recorded quantities the tests check, by kind of case: patterns of names, one constant for each test."""

from __future__ import annotations

from cases import Case, is_claimed

EVA = (
    "pos_embed_used",
    "patch_embed",
    "attn_0",
    "mlp_0",
    "block_*",
    "features",
    "ln_vision_out",
    "probe_loss",
    "grads",
    "grad_image",
)
QFORMER = ("image_only_*", "text_only_*", "multimodal_*", "itg_*")
STAGE1 = (
    "image_embeds",
    "query_last",
    "image_feats",
    "text_cls",
    "text_feat",
    "sim_[it]2[it]",
    "itm_logits",
    "loss_lm",
    "grads_itg",
    "ret_loss_lm",
    "feat_*",
    "compute_itm",
    "text_ids",
    "text_mask",
    "config.temp",
)
SPECIAL_IDS = ("config.bos", "config.eos", "config.pad_token_id", "config.dec_token_id")
RETRIEVAL = ("score_i2t", "score_t2i", "config.metrics")
# Of a MiniGPT-4 training batch, recorded as "<batch>_<field>".
TRAINING_FIELDS = (
    "inputs_embeds",
    "attention_mask",
    "targets",
    "logits",
    "loss",
    "loss_reduction_none",
    "grad_llama_proj.weight",
    "grad_llama_proj.bias",
)
TRAINING = ("img_embeds", *(f"*_{field}" for field in TRAINING_FIELDS))
SEGMENTS = ("config.answer_ids", "config.prompt_segments_ids", "config.gen_context_segments_ids")
CONTEXTS = ("gen_context_emb_*", "gen_first_logits_*", "chat_truncated_context", "multi_image_context")
GREEDY = ("gen_greedy*", "config.generate.greedy*.text")
BEAMS = ("gen_beam*", "config.generate.beam*.text")
QFORMER_CAPTIONS = ("caption_ids_beam*",)
STOP_TEST = ("config.stop_test",)
CHAT = ("config.chat_turns",)
EVALUATION_TRANSFORM = ("eval_*",)
RESIZED = ("resized_u8_*",)
TRAINING_TRANSFORM = ("train_[0-9]*",)
CAPTIONS = ("captions.*",)
SCHEDULES = ("*_lr",)
TRAJECTORY = ("loss_*", "step*_llama_proj.*", "step*_grad_llama_proj.*", "config.decay", "config.no_decay")
ADAPTED = ("logits", "loss", "grads")
ADAPTED_FILE = ("config.checkpoint_keys", "config.trainable")
TRAINED = ("config.trainable",)
PRETRAINED = (
    "loss",
    "loss_it[cm]",
    "ret_loss",
    "ret_loss_it[cm]",
    "weights_[it]2[it]",
    "ret_weights_[it]2[it]",
    "grads_it[cm]",
    "grads_total",
    "config.trainable",
    "config.trainable_without_grad",
)
RANKS = ("rank*.loss*", "rank*.weights_[it]2[it]", "grads_total_mean_over_ranks")
STAGE1_STEPS = ("loss_*", "params_after_step*", "config.param_groups")
# Of a BLIP-2 batch on OPT, recorded as "<batch>_<field>"; on T5 there is one, without a name.
GENERATIVE_FIELDS = ("inputs_embeds", "attention_mask", "targets", "logits", "loss", "input_ids")
ON_OPT = (*(f"*prompt_{field}" for field in GENERATIVE_FIELDS), "grads_*prompt")
ON_T5 = (*GENERATIVE_FIELDS, "input_mask", "decoder_attention_mask", "encoder_last", "grads")
ANSWERS = ("gen_*", "vqa_ids")
SAVED = ("config.saved_checkpoint_model_keys",)

CHECKED = {
    "eva": EVA,
    "qformer": (*QFORMER, *SPECIAL_IDS),
    "blip2_stage1": (*STAGE1, *PRETRAINED, *QFORMER_CAPTIONS, *SPECIAL_IDS),
    "blip2_ranks": RANKS,
    "adamw_stage1": STAGE1_STEPS,
    "blip2_retrieval": RETRIEVAL,
    "minigpt4": (*SPECIAL_IDS, *TRAINING, *TRAINED, *SEGMENTS, *CONTEXTS, *GREEDY, *BEAMS, *STOP_TEST, *CHAT),
    "minigptv2": (*SPECIAL_IDS, *TRAINING),
    "minigptv2_lora": (*ADAPTED, *ADAPTED_FILE),
    "lr_schedule": SCHEDULES,
    "adamw_minigpt4": (*TRAJECTORY, *SAVED),
    "blip2_opt": (*ON_OPT, *TRAINED, *ANSWERS),
    "blip2_t5": (*ON_T5, *TRAINED, *ANSWERS),
    "preprocess": (*EVALUATION_TRANSFORM, *RESIZED, *TRAINING_TRANSFORM, *CAPTIONS),
}
# What the original drew at random or was told: tests start from it.
GIVEN = {
    "blip2_stage1": ("neg_*_idx", "ret_neg_*_idx", "ret_image_id", "itm_labels"),
    "blip2_opt": ("*prompt_prompt_length", "vqa_input_*"),
    "blip2_t5": ("vqa_input_*",),
    "preprocess": ("train_box_*", "train_flip_*"),
    "lr_schedule": ("*_epoch_step",),
    "adamw_minigpt4": ("lr_*",),
    "adamw_stage1": ("lr_*", "neg_*_idx_*"),
    "blip2_ranks": ("rank*.neg_*_idx",),
}


def is_checked(case: Case, quantity: str) -> bool:
    return is_claimed(quantity, CHECKED.get(case.kind, ()))


def is_given(case: Case, quantity: str) -> bool:
    return is_claimed(quantity, GIVEN.get(case.kind, ()))
