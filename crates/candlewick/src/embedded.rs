//! The small base model and the fine-tuning data that the program carries. `scripts/make-assets/README.md` says how they were made.

use crate::model::ModelFiles;

/// Embeds one file of `assets/`.
macro_rules! asset {
    ($path:literal) => {
        include_bytes!(concat!(env!("CARGO_MANIFEST_DIR"), "/assets/", $path))
    };
}

/// A Llama of 3.7 million parameters that has read the King James Bible.
pub const BASE: ModelFiles = ModelFiles::Embedded(&[
    ("config.json", asset!("base/config.json")),
    ("model.safetensors", asset!("base/model.safetensors")),
    ("special_tokens_map.json", asset!("base/special_tokens_map.json")),
    ("tokenizer.json", asset!("base/tokenizer.json")),
    ("tokenizer_config.json", asset!("base/tokenizer_config.json")),
]);

/// Training rows: short recipes.
pub const TRAIN: &[u8] = asset!("data/train.jsonl");

/// Validation rows, of the same kind.
pub const VALID: &[u8] = asset!("data/valid.jsonl");
