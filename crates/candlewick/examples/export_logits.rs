//! Writes the logits of a prompt, for comparison with transformers and PEFT (`scripts/golden/check_adapter.py`):
//!
//! ```sh
//! cargo run --release --example export_logits -- MODEL_FOLDER ADAPTER_FOLDER|none "a prompt" logits.safetensors
//! ```

use std::path::Path;

use candle_core::{DType, Device, Tensor};
use candlewick::files::write_safetensors;
use candlewick::model::{ModelFiles, load_config, load_frozen, load_tokenizer};
use candlewick::{Error, Result, lora};

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [model, adapter, prompt, out] = arguments.as_slice() else {
        return Err(Error::Config("usage: export_logits MODEL ADAPTER|none PROMPT OUT".into()));
    };
    let files = ModelFiles::Folder(model.into());
    let tokenizer = load_tokenizer(&files, &load_config(&files)?)?;
    let mut decoder = load_frozen(&files, Some(DType::F32), &Device::Cpu)?;
    if adapter != "none" {
        lora::load(&mut decoder, Path::new(adapter))?;
    }
    let encoding = tokenizer.encode(prompt.as_str(), true).map_err(|e| Error::Tokenizer(e.to_string()))?;
    let ids = Tensor::new(encoding.get_ids(), &Device::Cpu)?.unsqueeze(0)?;
    let logits = decoder.forward(&ids, None, None)?;
    let tensors = vec![("input_ids".into(), ids.to_dtype(DType::I64)?), ("logits".into(), logits)];
    write_safetensors(Path::new(out), tensors, [("format".to_string(), "pt".to_string())])
}
