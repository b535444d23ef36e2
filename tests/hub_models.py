"""Models in the hub's format, tiny and with random weights, one of each family that the encoders have to read."""

WORDS = ("[PAD]", "[UNK]", "</s>", "a", "red", "blue", "green", "film", "about", "dogs", "cats", "love", ",", ".")
_SIZE = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
_PICTURES = {"image_size": 32, "patch_size": 8, "num_channels": 3}


def write_models(folder):
    """Write them to folder/tests__<name>, where text-tests__<name> finds them."""
    import torch
    import transformers as hub

    torch.manual_seed(0)
    words = {"vocab_size": len(WORDS), "pad_token_id": 0}
    bert = hub.BertModel(hub.BertConfig(**_SIZE, **words, max_position_embeddings=12, initializer_range=0.5))
    t5 = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 3, "num_heads": 2, "decoder_start_token_id": 0, **words}
    bart = {"d_model": 16, "max_position_embeddings": 12, "encoder_layers": 3, "decoder_layers": 1, "init_std": 0.5}
    bart |= {"encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    bart |= {"bos_token_id": 1, "eos_token_id": 2, "forced_eos_token_id": 2, "decoder_start_token_id": 2, **words}
    llama = hub.LlamaConfig(**_SIZE, vocab_size=len(WORDS), max_position_embeddings=64, initializer_range=0.5)
    clip = hub.CLIPConfig(
        text_config={**_SIZE, **words, "max_position_embeddings": 12, "bos_token_id": 1, "eos_token_id": 2},
        vision_config={**_SIZE, **_PICTURES},
        projection_dim=8,
    )
    resnet = hub.ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic")
    swin = hub.SwinConfig(**_PICTURES, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=2)
    vit = hub.ViTConfig(**_SIZE, **_PICTURES, initializer_range=0.5)
    side, square = {"size": {"shortest_edge": 32}}, {"size": {"height": 32, "width": 32}}
    cut = {"crop_size": {"height": 32, "width": 32}}
    for name, model, reader in (
        ("bert", bert, _tokenizer()),
        ("t5", hub.T5ForConditionalGeneration(hub.T5Config(**t5)), _tokenizer()),
        ("t5-encoder", hub.T5EncoderModel(hub.T5Config(**t5)), _tokenizer()),
        ("bart", hub.BartModel(hub.BartConfig(**bart)), _tokenizer()),
        ("llama", hub.LlamaForCausalLM(llama), _tokenizer(pad_token=None, padding_side="left")),
        ("resnet", hub.ResNetModel(resnet), hub.ConvNextImageProcessor(**side)),
        ("swin", hub.SwinModel(swin), hub.ViTImageProcessor(**square)),
        ("vit", hub.ViTModel(vit), hub.ViTImageProcessor(**square)),
        ("vit-classifier", hub.ViTForImageClassification(vit), hub.ViTImageProcessor(**square)),
        ("clip", hub.CLIPModel(clip), hub.CLIPImageProcessor(**side, **cut)),
    ):
        model.save_pretrained(folder / f"tests__{name}")
        reader.save_pretrained(folder / f"tests__{name}")
    _tokenizer().save_pretrained(folder / "tests__clip")
    _write_sentences(folder)


def _tokenizer(pad_token="[PAD]", padding_side="right"):
    import tokenizers
    import transformers as hub

    model = tokenizers.models.WordLevel({word: place for place, word in enumerate(WORDS)}, unk_token="[UNK]")
    words = tokenizers.Tokenizer(model)
    words.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    words.post_processor = tokenizers.processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 2)])
    names = {"unk_token": "[UNK]", "eos_token": "</s>", "pad_token": pad_token, "padding_side": padding_side}
    return hub.PreTrainedTokenizerFast(tokenizer_object=words, **{key: name for key, name in names.items() if name})


def _write_sentences(folder):
    """Write a model that says itself how it pools: the mean, to unit length."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import modules

    transformer = modules.Transformer(str(folder / "tests__bert"))
    pooling = modules.Pooling(transformer.get_embedding_dimension(), "mean")
    model = SentenceTransformer(modules=[transformer, pooling, modules.Normalize()], device="cpu")
    model.save(str(folder / "tests__sentences"))
