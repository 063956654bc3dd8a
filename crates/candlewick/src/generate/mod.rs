//! Text from a model, token by token.

mod sampling;

use sampling::Sampler;
pub use sampling::Sampling;

use std::ops::ControlFlow;

use candle_core::{DType, Tensor};
use tokenizers::Tokenizer;

use crate::model::{Decoder, KvCache};
use crate::{Error, Result};

/// What [`generate`] does besides sampling.
#[derive(Debug, Clone, Copy)]
pub struct GenerateOptions {
    /// At most this many new tokens; also bounded by the model's positions.
    pub max_tokens: usize,
    /// How the next token is chosen.
    pub sampling: Sampling,
}

/// Why a text ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StopReason {
    /// The model produced an end-of-text token.
    EndOfText,
    /// `max_tokens`, or the model's last position.
    Length,
    /// The caller asked to stop.
    Cancelled,
}

/// What [`generate`] did.
#[derive(Debug, Clone, Copy)]
pub struct Generated {
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// New tokens, the end-of-text token not counted.
    pub new_tokens: usize,
    /// Why the text ended.
    pub stop: StopReason,
}

/// Continues `prompt`, handing over the text piece by piece, as soon as its characters are complete.
///
/// # Errors
/// A prompt without tokens or longer than the model's positions, sampling options out of range, or a failed tensor operation.
pub fn generate(
    decoder: &Decoder,
    tokenizer: &Tokenizer,
    prompt: &str,
    options: GenerateOptions,
    mut on_text: impl FnMut(&str) -> ControlFlow<()>,
) -> Result<Generated> {
    let encoding = tokenizer.encode(prompt, true).map_err(|e| Error::Tokenizer(e.to_string()))?;
    let mut stream = tokenizer.decode_stream(true);
    let mut failure = None;
    let generated =
        generate_tokens(decoder, encoding.get_ids(), options, |token| match stream.step(token) {
            Ok(Some(text)) => on_text(&text),
            Ok(None) => ControlFlow::Continue(()),
            Err(e) => {
                failure = Some(Error::Tokenizer(e.to_string()));
                ControlFlow::Break(())
            }
        })?;
    failure.map_or(Ok(generated), Err)
}

/// Continues a sequence of token ids, handing over each new one.
///
/// # Errors
/// As [`generate`].
pub fn generate_tokens(
    decoder: &Decoder,
    prompt: &[u32],
    options: GenerateOptions,
    mut on_token: impl FnMut(u32) -> ControlFlow<()>,
) -> Result<Generated> {
    if prompt.is_empty() {
        return Err(Error::Config("the prompt has no tokens".into()));
    }
    let config = decoder.config();
    let mut sampler = Sampler::new(options.sampling)?;
    let mut cache = KvCache::new(config);
    let mut generated = Generated { prompt_tokens: prompt.len(), new_tokens: 0, stop: StopReason::Length };
    let mut pending = prompt.to_vec();
    while generated.new_tokens < options.max_tokens
        && cache.len() + pending.len() <= config.max_position_embeddings
    {
        let ids = Tensor::new(pending.as_slice(), decoder.device())?.unsqueeze(0)?;
        let logits = decoder.next_logits(&ids, &mut cache)?;
        let token = sampler.sample(&logits.flatten_all()?.to_dtype(DType::F32)?.to_vec1::<f32>()?)?;
        if config.eos_token_ids.contains(&token) {
            generated.stop = StopReason::EndOfText;
            break;
        }
        generated.new_tokens += 1;
        if on_token(token).is_break() {
            generated.stop = StopReason::Cancelled;
            break;
        }
        pending = vec![token];
    }
    if generated.new_tokens == 0 && prompt.len() > config.max_position_embeddings {
        return Err(Error::Config(format!(
            "the prompt has {} tokens, more than the model's {} positions",
            prompt.len(),
            config.max_position_embeddings
        )));
    }
    Ok(generated)
}
