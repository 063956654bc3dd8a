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

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    const BOS: u32 = 1;
    const EOS: u32 = 2;

    /// Letters are tokens 10 to 35, `ab` is one token, and a beginning-of-text token is put first.
    fn tokenizer() -> Tokenizer {
        let letters = ('a'..='z').zip(10..).map(|(letter, id)| (letter.to_string(), id.into()));
        let special =
            [("<s>", BOS), ("</s>", EOS), ("ab", 40)].map(|(text, id)| (text.to_owned(), id.into()));
        let vocab: serde_json::Map<String, serde_json::Value> = special.into_iter().chain(letters).collect();
        let begin = serde_json::json!({"SpecialToken": {"id": "<s>", "type_id": 0}});
        let text = serde_json::json!({"Sequence": {"id": "A", "type_id": 0}});
        let second = serde_json::json!({"Sequence": {"id": "B", "type_id": 0}});
        let json = serde_json::json!({
            "version": "1.0",
            "model": {"type": "BPE", "vocab": vocab, "merges": [["a", "b"]]},
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [begin, text], "pair": [begin, text, second],
                "special_tokens": {"<s>": {"id": "<s>", "ids": [BOS], "tokens": ["<s>"]}}
            },
        });
        Tokenizer::from_bytes(json.to_string()).unwrap()
    }

    fn options() -> EncodeOptions {
        EncodeOptions { eos: Some(EOS), mask_prompt: true, max_length: 8, truncate: false }
    }

    fn encode(lines: &str, options: EncodeOptions) -> Result<Dataset> {
        let rows = Rows::from_reader(Path::new("train.jsonl"), lines.as_bytes())?;
        Dataset::encode(&rows, &tokenizer(), options)
    }

    fn only(line: &str, options: EncodeOptions) -> Sequence {
        encode(line, options).unwrap().sequences()[0].clone()
    }

    fn message(lines: &str, options: EncodeOptions) -> String {
        encode(lines, options).unwrap_err().to_string()
    }

    #[test]
    fn text_is_learned_whole_and_ends() {
        let sequence = only(r#"{"text": "cab"}"#, options());
        assert_eq!(sequence, Sequence { tokens: vec![BOS, 12, 40, EOS], prompt: 0 });
        assert_eq!(sequence.learned(), 3);
        assert_eq!(
            only(r#"{"text": "cab"}"#, EncodeOptions { eos: None, ..options() }).tokens,
            [BOS, 12, 40]
        );
        // An end that is there already is not doubled.
        assert_eq!(
            only(r#"{"text": "cab"}"#, EncodeOptions { eos: Some(40), ..options() }).tokens,
            [BOS, 12, 40]
        );
    }

    #[test]
    fn the_prompt_is_given_up_to_the_seam() {
        let sequence = only(r#"{"prompt": "cd", "completion": "ef"}"#, options());
        assert_eq!(sequence, Sequence { tokens: vec![BOS, 12, 13, 14, 15, EOS], prompt: 3 });
        assert_eq!(sequence.learned(), 3);
        // `ab` is one token across the seam: it is learned.
        let sequence = only(r#"{"prompt": "ca", "completion": "be"}"#, options());
        assert_eq!(sequence, Sequence { tokens: vec![BOS, 12, 40, 14, EOS], prompt: 2 });
        let unmasked = EncodeOptions { mask_prompt: false, ..options() };
        assert_eq!(only(r#"{"prompt": "cd", "completion": "ef"}"#, unmasked).prompt, 0);
        // An empty completion is a lesson in stopping.
        assert_eq!(only(r#"{"prompt": "cd", "completion": ""}"#, options()).learned(), 1);
    }

    #[test]
    fn rows_that_cannot_be_used_are_named() {
        let text = "{\"text\": \"cd\"}\n\n{\"text\": \"cdefghij\"}";
        let expected = "train.jsonl:3: the row has 10 tokens, the maximum is 8; shorten it, raise the maximum, or allow truncation";
        assert_eq!(message(text, options()), expected);
        let no_eos = EncodeOptions { eos: None, ..options() };
        let expected = "train.jsonl:1: a row needs at least 2 tokens to learn from, got 1";
        assert_eq!(message(r#"{"text": ""}"#, no_eos), expected);
        let empty = message(r#"{"prompt": "cd", "completion": ""}"#, no_eos);
        assert!(empty.starts_with("train.jsonl:1: the completion is empty"), "{empty}");
    }

    #[test]
    fn truncation_counts_what_it_cuts_and_drops() {
        let truncate = EncodeOptions { truncate: true, max_length: 4, ..options() };
        let lines = [("cd", "e"), ("cd", "efg"), ("cdefg", "h")]
            .map(|(prompt, completion)| format!(r#"{{"prompt": "{prompt}", "completion": "{completion}"}}"#));
        let dataset = encode(&lines.join("\n"), truncate).unwrap();
        assert_eq!(dataset.truncation(), Truncation { cut: 3, dropped: 1 });
        assert_eq!(dataset.sequences().len(), 2);
        assert_eq!(dataset.sequences()[1], Sequence { tokens: vec![BOS, 12, 13, 14], prompt: 3 });
        let nothing = message(&lines[2], truncate);
        assert_eq!(nothing, "train.jsonl:1: no row has anything to learn in its first 4 tokens");
    }

    #[test]
    fn packing_predicts_every_token_but_the_first_once() {
        let stream: Vec<u32> = (0..10).collect();
        for length in 1..12 {
            let blocks = pack(&stream, length).unwrap();
            let predicted: Vec<u32> = blocks.iter().flat_map(|block| &block.tokens[1..]).copied().collect();
            assert_eq!(predicted, stream[1..]);
            assert!(blocks.iter().all(|block| block.learned() > 0 && block.tokens.len() <= length + 1));
        }
        assert!(pack(&stream, 0).is_err());
        assert!(pack(&[7], 4).unwrap().is_empty());
    }

    #[test]
    fn the_fingerprint_sees_every_change() {
        let base = [vec![1, 2, 3], vec![4, 5]];
        let print = |rows: &[Vec<u32>], prompt| {
            let sequences = rows.iter().map(|tokens| Sequence { tokens: tokens.clone(), prompt }).collect();
            Dataset::from_sequences(sequences).unwrap().fingerprint()
        };
        let original = print(&base, 0);
        assert_eq!(original, print(&base, 0));
        let swapped = [base[1].clone(), base[0].clone()];
        for changed in [print(&base, 1), print(&swapped, 0), print(&[vec![1, 2], vec![3, 4, 5]], 0)] {
            assert_ne!(original, changed);
        }
    }

    #[test]
    fn the_limit_never_passes_the_models() {
        assert_eq!(sequence_limit(None, 2048, Some(512)).unwrap(), 512);
        assert_eq!(sequence_limit(None, 2048, None).unwrap(), 2048);
        assert_eq!(sequence_limit(Some(100), 2048, Some(512)).unwrap(), 100);
        let error = sequence_limit(Some(1024), 2048, Some(512)).unwrap_err().to_string();
        assert_eq!(
            error,
            "max-seq-length is 1024, but the model has 512 positions (max_position_embeddings)"
        );
        assert!(sequence_limit(Some(1), 2048, None).is_err());
    }
}
