# SPDX-License-Identifier: Apache-2.0
"""A decoder as a model of transformers: importing this registers the ``model_type`` "fomoe".

After that, ``AutoConfig`` and ``AutoModelForCausalLM`` read what ``fomoe export --format
huggingface`` wrote, and ``save_pretrained`` writes it again.
"""

from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
    initialization,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from fomoe.integrations.transformers.cache import PaddedStep
from fomoe.models import Decoder, DecoderConfig
from fomoe.models.feed_forward import FeedForward
from fomoe.nn import Experts, MoE, SharedExpert, auxiliary_loss

__all__ = ["FomoeConfig", "FomoeForCausalLM"]


class FomoeConfig(PreTrainedConfig):  # type: ignore[misc]
    """``fomoe_model`` holds the fields of :class:`fomoe.models.DecoderConfig`."""

    model_type = "fomoe"
    tie_word_embeddings: bool = False  # of modules; a tied decoder has its embedding once
    fomoe_model: dict[str, Any] | None = None

    def decoder_config(self) -> DecoderConfig:
        """The fields, checked.

        Raises
        ------
        ValueError
            If there are none, or one does not fit.
        """
        if self.fomoe_model is None:
            raise ValueError("FomoeConfig: expected fomoe_model, the fields of a DecoderConfig")
        return DecoderConfig.from_dict(self.fomoe_model)

    @property
    def vocab_size(self) -> int:
        return self._field("vocab_size")

    @property
    def hidden_size(self) -> int:
        return self._field("dim")

    @property
    def num_hidden_layers(self) -> int:
        return self._field("num_layers")

    @property
    def num_attention_heads(self) -> int:
        return self._field("num_heads")

    @property
    def max_position_embeddings(self) -> int:
        return self._field("context_length")

    def _field(self, name: str) -> int:
        value: int = (self.fomoe_model or {}).get(name, 0)
        return value


class FomoeForCausalLM(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """``model`` is the :class:`fomoe.models.Decoder`.

    It takes no embeddings in place of tokens. ``generate`` keeps keys and values in a cache of
    transformers; padding may be on either side.
    """

    config_class = FomoeConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True

    def __init__(self, config: FomoeConfig) -> None:
        super().__init__(config)
        self.model = Decoder(config.decoder_config())
        self.generation_config = GenerationConfig()
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int = 0,
        use_cache: bool | None = None,
        past_key_values: Any = None,
        position_ids: Tensor | None = None,
        return_dict: bool | None = None,
        **options: Any,
    ) -> CausalLMOutputWithPast | tuple[Tensor, ...]:
        """Logits, and with labels the loss.

        Parameters
        ----------
        input_ids : Tensor, (B, S), int64
        attention_mask : Tensor, (B, S with what the cache has), optional
            0 for padding.
        labels : Tensor, (B, S), int64, optional
            Tokens, shifted by the model, -100 where there is no loss. In training the routers'
            auxiliary losses are added to the mean cross entropy.
        logits_to_keep : int
            Of that many last positions; 0: of all.
        use_cache : bool, optional
            Begin a cache, if there is none.
        past_key_values : transformers.DynamicCache, optional
            Of the tokens before these.
        position_ids : Tensor, (B, S), int64, optional
            Accepted where they are those that the mask gives: sequences packed into one are not
            told apart.

        Raises
        ------
        ValueError
            The mask has another length, the positions or the cache are of another kind, or hidden
            states or attentions are asked for.
        """
        for name in ("output_hidden_states", "output_attentions"):
            if options.pop(name, False):
                raise ValueError(f"{name}: FomoeForCausalLM gives none")
        cache = past_key_values
        if self.training and self.model.gradient_checkpointing:
            cache, use_cache = None, False  # a layer that runs twice would extend it twice
        if cache is None and use_cache:
            cache = DynamicCache()
        step = None
        if cache is not None or (attention_mask is not None and not bool(attention_mask.all())):
            step = PaddedStep(input_ids, attention_mask, cache)
        if position_ids is not None:
            _require_positions(position_ids, input_ids, step)
        hidden = self.model.hidden(input_ids, step)
        logits = self.model.unembed(hidden[:, -logits_to_keep:])
        loss = None
        if labels is not None:
            size = self.config.vocab_size
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=size, **options)
            if self.training:
                loss = loss + auxiliary_loss(self.model).to(loss.device)
        output = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache)
        return output if return_dict is not False else output.to_tuple()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embedding

    def get_output_embeddings(self) -> nn.Module:
        tied = self.model.config.tie_embeddings
        return self.model.embedding if tied else self.model.unembedding

    def resize_token_embeddings(self, *arguments: Any, **options: Any) -> NoReturn:
        raise NotImplementedError("FomoeForCausalLM: the vocabulary cannot be resized")

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Also after loading, for the buffers that are not stored."""
        super()._init_weights(module)
        if isinstance(module, MoE):
            module.reset_buffers()
        if isinstance(module, FeedForward | Experts | SharedExpert):
            for weight in (module.w1, module.w2):
                initialization.normal_(weight, std=weight.shape[-1] ** -0.5)


def _require_positions(position_ids: Tensor, tokens_BS: Tensor, step: PaddedStep | None) -> None:
    if step is None:
        expected, is_token = torch.arange(tokens_BS.shape[1], device=tokens_BS.device), None
    else:
        expected, is_token = step.positions_BS, step.is_token_BL[:, step.past :]
    differs = position_ids != expected
    if bool((differs if is_token is None else differs & is_token).any()):
        raise ValueError(
            "position_ids: expected those of the attention mask, from 0 on in every row; packed "
            "sequences are not told apart"
        )


AutoConfig.register(FomoeConfig.model_type, FomoeConfig)
AutoModelForCausalLM.register(FomoeConfig, FomoeForCausalLM)
