//! Data sets: from lines of JSON to batches of tokens.
//!
//! ```text
//! train.jsonl ──rows──▶ Rows ──encode──▶ Dataset ──batches──▶ Batch
//!                      (lines)         (token ids)       (padded tensors)
//! ```
//!
//! A folder holds `train.jsonl`, and beside it `valid.jsonl` and `test.jsonl` where there are any. Each line is
//! one JSON object of one of the [`RowFormat`]s; the first row tells which, and the others must agree with it.

mod batches;
mod encode;
mod rows;

pub use batches::{Batches, IGNORED, Position, in_order};
pub use encode::{Dataset, EncodeOptions, Sequence, Truncation, pack, sequence_limit};
pub use rows::{Row, RowContent, RowFormat, Rows};
