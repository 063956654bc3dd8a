//! From rows to token ids.

use rayon::prelude::*;
use tokenizers::Tokenizer;

use super::rows::{Row, RowContent, Rows, data_error};
use crate::{Error, Result};

/// How rows become sequences.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EncodeOptions {
    /// Put after every row that does not already end with it, so that the model learns to stop.
    pub eos: Option<u32>,
    /// Learn the completion only.
    pub mask_prompt: bool,
    /// The most tokens that a sequence may have.
    pub max_length: usize,
    /// Cut longer sequences at `max_length` instead of refusing them.
    pub truncate: bool,
}

/// The token ids of one training example.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sequence {
    /// At least two.
    pub tokens: Vec<u32>,
    /// So many tokens at the start are given, not learned. The first token is never learned, since nothing
    /// predicts it.
    pub prompt: usize,
}

impl Sequence {
    /// How many tokens count in the loss.
    #[must_use]
    pub fn learned(&self) -> usize {
        self.tokens.len().saturating_sub(self.prompt.max(1))
    }
}

/// What `truncate` did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Truncation {
    /// Rows that were cut.
    pub cut: usize,
    /// Rows left out because nothing to learn remained.
    pub dropped: usize,
}

/// A tokenized data set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dataset {
    /// The examples; at least one, each with something to learn.
    sequences: Vec<Sequence>,
    truncation: Truncation,
}

impl Dataset {
    /// Tokenizes rows with the tokenizer's own special tokens (a beginning-of-text token, where it has one), and
    /// appends `eos`.
    ///
    /// Prompt and completion are tokenized **as one text**, because that is the text that the model will see; the
    /// prompt ends where its own tokens stop agreeing with those of the whole. A token that spans the seam belongs
    /// to the completion.
    ///
    /// Fails, naming the line, on a row with fewer than two tokens, with nothing to learn, or longer than
    /// `max_length` when `truncate` is off.
    pub fn encode(rows: &Rows, tokenizer: &Tokenizer, options: EncodeOptions) -> Result<Self> {
        let encoded: Vec<Encoded> = rows
            .rows
            .par_iter()
            .map(|row| {
                encode_row(row, tokenizer, options)
                    .map_err(|message| data_error(&rows.path, row.line, message))
            })
            .collect::<Result<_>>()?;
        let mut truncation = Truncation::default();
        let mut sequences = Vec::with_capacity(encoded.len());
        for Encoded { sequence, cut } in encoded {
            truncation.cut += usize::from(cut);
            if sequence.learned() == 0 {
                truncation.dropped += 1;
            } else {
                sequences.push(sequence);
            }
        }
        if sequences.is_empty() {
            let longest = options.max_length;
            return Err(data_error(
                &rows.path,
                1,
                format!("no row has anything to learn in its first {longest} tokens"),
            ));
        }
        Ok(Self { sequences, truncation })
    }

    /// Sequences from elsewhere. Fails when there are none, or one has nothing to learn.
    pub fn from_sequences(sequences: Vec<Sequence>) -> Result<Self> {
        if sequences.is_empty() {
            return Err(Error::Config("a data set needs at least one sequence".to_owned()));
        }
        if let Some(index) = sequences.iter().position(|sequence| sequence.learned() == 0) {
            return Err(Error::Config(format!("sequence {index} of the data set has nothing to learn")));
        }
        Ok(Self { sequences, truncation: Truncation::default() })
    }

    /// The examples; at least one.
    #[must_use]
    pub fn sequences(&self) -> &[Sequence] {
        &self.sequences
    }

    /// What `truncate` did.
    #[must_use]
    pub const fn truncation(&self) -> Truncation {
        self.truncation
    }

    /// A number that changes when any token, boundary or the order does (64-bit FNV-1a). It tells a resumed run
    /// that its data is not the data it began with; it is no defence against intent.
    #[must_use]
    pub fn fingerprint(&self) -> u64 {
        let mut hash = 0xcbf2_9ce4_8422_2325_u64;
        let mut add = |word: u64| {
            for byte in word.to_le_bytes() {
                hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
            }
        };
        for sequence in &self.sequences {
            add(sequence.tokens.len() as u64);
            add(sequence.prompt as u64);
            sequence.tokens.iter().for_each(|&token| add(u64::from(token)));
        }
        hash
    }

    /// For pretraining: joins all sequences into one stream and cuts it into blocks whose inputs are `length`
    /// tokens long. Neighbouring blocks share one token, so that every token but the stream's first is predicted
    /// exactly once. The last block may be shorter.
    ///
    /// Fails when `length` is zero.
    pub fn pack(&self, length: usize) -> Result<Self> {
        let stream: Vec<u32> = self.sequences.iter().flat_map(|sequence| &sequence.tokens).copied().collect();
        Self::from_sequences(pack(&stream, length)?)
    }
}

/// Cuts a stream of tokens into blocks whose inputs are `length` tokens long; see [`Dataset::pack`].
pub fn pack(stream: &[u32], length: usize) -> Result<Vec<Sequence>> {
    if length == 0 {
        return Err(Error::Config("blocks must be at least 1 token long, got 0".to_owned()));
    }
    let starts = (0..stream.len().saturating_sub(1)).step_by(length);
    let block = |start: usize| stream.get(start..(start + length + 1).min(stream.len())).unwrap_or_default();
    Ok(starts.map(|start| Sequence { tokens: block(start).to_vec(), prompt: 0 }).collect())
}

struct Encoded {
    sequence: Sequence,
    cut: bool,
}

fn encode_row(
    row: &Row,
    tokenizer: &Tokenizer,
    options: EncodeOptions,
) -> std::result::Result<Encoded, String> {
    let (mut tokens, mut prompt) = match &row.content {
        RowContent::Text(text) => (ids(tokenizer, text)?, 0),
        RowContent::Completion { prompt, completion } => {
            let whole = ids(tokenizer, &format!("{prompt}{completion}"))?;
            let given = if options.mask_prompt { ids(tokenizer, prompt)? } else { Vec::new() };
            let shared = whole.iter().zip(&given).take_while(|(a, b)| a == b).count();
            (whole, shared)
        }
    };
    if let Some(eos) = options.eos
        && tokens.last() != Some(&eos)
    {
        tokens.push(eos);
    }
    let length = tokens.len();
    if length < 2 {
        return Err(format!("a row needs at least 2 tokens to learn from, got {length}"));
    }
    prompt = prompt.min(length);
    if length == prompt {
        return Err(
            "the completion is empty and no end-of-text token follows it: nothing to learn".to_owned()
        );
    }
    let cut = length > options.max_length;
    if cut && !options.truncate {
        let max = options.max_length;
        return Err(format!(
            "the row has {length} tokens, the maximum is {max}; shorten it, raise the maximum, or allow truncation"
        ));
    }
    tokens.truncate(options.max_length);
    Ok(Encoded { sequence: Sequence { tokens, prompt }, cut })
}

fn ids(tokenizer: &Tokenizer, text: &str) -> std::result::Result<Vec<u32>, String> {
    let encoding =
        tokenizer.encode_fast(text, true).map_err(|error| format!("the tokenizer fails: {error}"))?;
    Ok(encoding.get_ids().to_vec())
}

/// Settles how long a sequence may be: what was asked for, else `default`, and never more than the model's
/// positions. Fails when more was asked for than the model has.
pub fn sequence_limit(asked: Option<usize>, default: usize, positions: Option<usize>) -> Result<usize> {
    match (asked, positions) {
        (Some(0 | 1), _) => Err(Error::Config("max-seq-length must be at least 2".to_owned())),
        (Some(asked), Some(positions)) if asked > positions => Err(Error::Config(format!(
            "max-seq-length is {asked}, but the model has {positions} positions (max_position_embeddings)"
        ))),
        (Some(asked), _) => Ok(asked),
        (None, positions) => Ok(positions.map_or(default, |positions| default.min(positions))),
    }
}
