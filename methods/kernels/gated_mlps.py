"""The MLPs of transformers, 5.17 to 5.23, whose forward is `down_proj(act_fn(gate_proj(x)) * up_proj(x))`, no more.

What act_fn is, a model's configuration says: SiLU in most families, GELU in Gemma's. tests/test_kernels.py compares the
list with the version that is installed.
"""

FAMILIES_AND_CLASSES = """
    afmoe.AfmoeMLP aimv2.Aimv2MLP aria.AriaSharedExpertsMLP axk1.AXK1MLP axk2.AXK2MLP bailing_hybrid.BailingHybridMLP
    bamba.BambaMLP blt.BltMLP chameleon.ChameleonMLP cohere.CohereMLP cohere2.Cohere2MLP cohere2_moe.Cohere2MoeMLP
    cohere_compass.CohereCompassMLP csm.CsmMLP cwm.CwmMLP deepseek_ocr2.DeepseekOcr2TextMLP
    deepseek_ocr2.DeepseekOcr2VisionMLP deepseek_v2.DeepseekV2MLP deepseek_v3.DeepseekV3MLP deepseek_v32.DeepseekV32MLP
    deimv2.Deimv2SwiGLUFFN diffllama.DiffLlamaMLP diffusion_gemma.DiffusionGemmaText4MLP dinov2.Dinov2SwiGLUFFN
    dinov2_with_registers.Dinov2WithRegistersSwiGLUFFN dinov3_vit.DINOv3ViTGatedMLP doge.DogeMLP dots1.Dots1MLP
    dots3_note.Dots3NoteTextMLP dots3_note.Dots3NoteVisionMLP embedding_gemma2.EmbeddingGemma2MLP emu3.Emu3MLP
    eomt.EomtSwiGLUFFN eomt_dinov3.EomtDinov3GatedMLP ernie4_5.Ernie4_5MLP ernie4_5_moe.Ernie4_5_MoeMLP
    ernie4_5_vl_moe.Ernie4_5_VLMoeMLP esmc.EsmcMLP eurobert.EuroBertMLP evolla.EvollaMLP exaone4.Exaone4MLP
    exaone_moe.ExaoneMoeMLP flex_olmo.FlexOlmoMLP flint.FlintMLP gemma.GemmaMLP gemma2.Gemma2MLP gemma3.Gemma3MLP
    gemma4.Gemma4TextMLP gemma4.Gemma4VisionMLP gemma4_unified.Gemma4UnifiedTextMLP glm4_moe.Glm4MoeMLP
    glm4_moe_lite.Glm4MoeLiteMLP glm4v_moe.Glm4vMoeTextMLP glm_moe_dsa.GlmMoeDsaMLP granite.GraniteMLP
    granite4_vision.Granite4VisionTextMLP granite_docling.GraniteDoclingTextMLP granite_swa.GraniteSWAMLP
    helium.HeliumMLP higgs_audio_v2.HiggsAudioV2MLP hrm_text.HrmTextMLP hunyuan_v1_dense.HunYuanDenseV1MLP
    hunyuan_v1_moe.HunYuanMoEV1MLP hunyuan_vl.HunYuanVLMLP hy_v3.HYV3MLP hy_v4.HYV4MLP hyperclovax.HyperCLOVAXMLP
    idefics.IdeficsMLP idefics2.Idefics2MLP jamba.JambaMLP kimi_linear.KimiLinearMLP kolibri1.Kolibri1MLP
    laguna.LagunaMLP llama.LlamaMLP longcat_flash.LongcatFlashMLP mellum.MellumMLP mimo_v2_flash.MiMoV2FlashMLP
    minicpm3.MiniCPM3MLP ministral.MinistralMLP ministral3.Ministral3MLP mistral.MistralMLP mistral4.Mistral4MLP
    mistral_large4.MistralLarge4TextMLP mllama.MllamaTextMLP molmo2.Molmo2ImageProjectorMLP molmo2.Molmo2MLP
    moonshine_streaming.MoonshinMoonshineStreamingDecoderMLP muse_glimmer.MuseGlimmerTextMLP
    muse_glimmer_assistant.MuseGlimmerAssistantMLP muse_spark.MuseSparkTextMLP nomic_bert.NomicBertMLP olmo.OlmoMLP
    olmo2.Olmo2MLP olmo3.Olmo3MLP olmo_hybrid.OlmoHybridMLP olmoe.OlmoeMLP ovis2.Ovis2MLP ovis2.Ovis2VisionMLP
    paddleocr_vl.PaddleOCRMLP pe_audio.PeAudioEncoderMLP pe_audio_video.PeAudioVideoEncoderMLP
    pe_video.PeVideoEncoderMLP pixtral.PixtralMLP qwen2.Qwen2MLP qwen2_5_vl.Qwen2MLP qwen2_moe.Qwen2MoeMLP
    qwen2_vl.Qwen2MLP qwen3.Qwen3MLP qwen3_5.Qwen3_5MLP qwen3_5_moe.Qwen3_5MoeMLP qwen3_moe.Qwen3MoeMLP
    qwen3_next.Qwen3NextMLP qwen3_omni_moe.Qwen3OmniMoeCode2WavMlp qwen3_omni_moe.Qwen3OmniMoeMLP
    qwen3_omni_moe.Qwen3OmniMoeTalkerTextMLP qwen3_omni_moe.Qwen3OmniMoeThinkerTextMLP qwen3_vl.Qwen3VLTextMLP
    qwen3_vl_moe.Qwen3VLMoeTextMLP qwen4_exp.Qwen4ExpTextMLP radio.RadioSwiGLUFFN rf_detr.RfDetrDinov2SwiGLUFFN
    sapiens2.Sapiens2GatedMLP smollm3.SmolLM3MLP solar_open.SolarOpenMLP stablelm.StableLmMLP
    tipsv2.Tipsv2VisionSwiGLUFFN ultrabert.UltrabertMLP unlimited_ocr.UnlimitedOcrTextMLP vaultgemma.VaultGemmaMLP
    vibevoice.VibeVoiceMLP videomt.VideomtGatedMLP videomt.VideomtSwiGLUFFN voxtral_realtime.VoxtralRealtimeMLP
    voxtral_realtime.VoxtralRealtimeTextMLP youtu.YoutuMLP zamba.ZambaMLP
"""
GATED_MLPS = frozenset(
    f"transformers.models.{family}.modeling_{family}.{name}"
    for family, name in (entry.split(".") for entry in FAMILIES_AND_CLASSES.split())
)
