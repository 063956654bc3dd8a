//! From sequences to padded tensors.

use candle_core::{Device, Tensor};
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use super::{Dataset, Sequence};
use crate::train::Batch;
use crate::{Error, Result};

/// A target that does not count.
pub const IGNORED: i64 = -100;

/// Where a run is in its data.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Position {
    /// Epochs completed.
    pub epoch: u64,
    /// Sequences of the present epoch already used.
    pub used: usize,
}

/// An endless stream of batches: every epoch visits every sequence once, in an order drawn from the seed and the
/// epoch's number alone, so that a [`Position`] is all there is to remember. The last batch of an epoch may be
/// smaller.
#[derive(Clone, Debug)]
pub struct Batches<'a> {
    dataset: &'a Dataset,
    batch_size: usize,
    seed: u64,
    position: Position,
    order: Vec<usize>,
}

impl<'a> Batches<'a> {
    /// Starts at `position`. Fails when `batch_size` is zero or the position is outside the data.
    pub fn new(dataset: &'a Dataset, batch_size: usize, seed: u64, position: Position) -> Result<Self> {
        if batch_size == 0 {
            return Err(Error::Config("batch-size must be at least 1, got 0".to_owned()));
        }
        let rows = dataset.sequences().len();
        if position.used > rows {
            let used = position.used;
            return Err(Error::Config(format!(
                "cannot continue after {used} sequences of a data set of {rows}"
            )));
        }
        let order = order(rows, seed, position.epoch);
        Ok(Self { dataset, batch_size, seed, position, order })
    }

    /// Where the next batch starts.
    #[must_use]
    pub const fn position(&self) -> Position {
        self.position
    }

    /// The next batch, on `device`.
    pub fn next(&mut self, device: &Device) -> Result<Batch> {
        if self.position.used >= self.order.len() {
            self.position = Position { epoch: self.position.epoch + 1, used: 0 };
            self.order = order(self.order.len(), self.seed, self.position.epoch);
        }
        let rest = self.order.get(self.position.used..).unwrap_or_default();
        let chosen: Vec<&Sequence> =
            rest.iter().take(self.batch_size).filter_map(|&row| self.dataset.sequences().get(row)).collect();
        self.position.used += chosen.len();
        collate(&chosen, device)
    }
}

/// The data set in its own order, for evaluation. Fails when `batch_size` is zero.
pub fn in_order<'a>(
    dataset: &'a Dataset,
    batch_size: usize,
    device: &'a Device,
) -> Result<impl Iterator<Item = Result<Batch>> + 'a> {
    if batch_size == 0 {
        return Err(Error::Config("batch-size must be at least 1, got 0".to_owned()));
    }
    Ok(dataset.sequences().chunks(batch_size).map(|chunk| collate(&chunk.iter().collect::<Vec<_>>(), device)))
}

/// Each epoch is its own `ChaCha` stream of the seed.
fn order(rows: usize, seed: u64, epoch: u64) -> Vec<usize> {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    random.set_stream(epoch);
    let mut order: Vec<usize> = (0..rows).collect();
    order.shuffle(&mut random);
    order
}

/// Inputs are all tokens but the last, targets all but the first; both are padded on the right to the longest
/// sequence. With causal attention no counted position ever sees the padding.
fn collate(sequences: &[&Sequence], device: &Device) -> Result<Batch> {
    let rows = sequences.len();
    let width = sequences.iter().map(|sequence| sequence.tokens.len()).max().unwrap_or(0).saturating_sub(1);
    let mut inputs = Vec::with_capacity(rows * width);
    let mut targets = Vec::with_capacity(rows * width);
    for (row, sequence) in (1..).zip(sequences) {
        let (Some((_, given)), Some((_, next))) =
            (sequence.tokens.split_last(), sequence.tokens.split_first())
        else {
            return Err(Error::Config("a sequence without tokens cannot be batched".to_owned()));
        };
        inputs.extend_from_slice(given);
        inputs.resize(row * width, 0);
        let masked = sequence.prompt.saturating_sub(1);
        targets.extend(next.iter().enumerate().map(
            |(at, &token)| {
                if at < masked { IGNORED } else { i64::from(token) }
            },
        ));
        targets.resize(row * width, IGNORED);
    }
    Ok(Batch {
        input_ids: Tensor::from_vec(inputs, (rows, width), device)?,
        targets: Tensor::from_vec(targets, (rows, width), device)?,
        tokens: sequences.iter().map(|sequence| sequence.learned()).sum(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dataset(lengths: &[usize]) -> Dataset {
        let sequence = |(row, &length): (u32, &usize)| Sequence {
            tokens: (0..u32::try_from(length).unwrap()).map(|at| 100 * (row + 1) + at).collect(),
            prompt: 0,
        };
        Dataset::from_sequences((0..).zip(lengths).map(sequence).collect()).unwrap()
    }

    fn firsts(batch: &Batch) -> Vec<u32> {
        batch.input_ids.to_vec2().unwrap().iter().map(|row: &Vec<u32>| row[0]).collect()
    }

    #[test]
    fn targets_are_shifted_masked_and_padded() {
        let sequences = vec![
            Sequence { tokens: vec![1, 2, 3, 4], prompt: 2 },
            Sequence { tokens: vec![5, 6], prompt: 0 },
            Sequence { tokens: vec![7, 8, 9], prompt: 2 },
        ];
        let dataset = Dataset::from_sequences(sequences).unwrap();
        let batch = in_order(&dataset, 3, &Device::Cpu).unwrap().next().unwrap().unwrap();
        assert_eq!(batch.input_ids.to_vec2::<u32>().unwrap(), [[1, 2, 3], [5, 0, 0], [7, 8, 0]]);
        let expected = [[-100, 3, 4], [6, -100, -100], [-100, 9, -100]];
        assert_eq!(batch.targets.to_vec2::<i64>().unwrap(), expected);
        assert_eq!(batch.tokens, expected.iter().flatten().filter(|&&target| target != -100).count());
    }

    #[test]
    fn every_epoch_visits_every_row_once_in_a_new_order() {
        let dataset = dataset(&[3; 7]);
        let mut batches = Batches::new(&dataset, 2, 42, Position::default()).unwrap();
        let mut epoch =
            || (0..4).flat_map(|_| firsts(&batches.next(&Device::Cpu).unwrap())).collect::<Vec<_>>();
        let (first, second) = (epoch(), epoch());
        assert_ne!(first, second);
        for mut seen in [first, second] {
            seen.sort_unstable();
            assert_eq!(seen, [100, 200, 300, 400, 500, 600, 700]);
        }
    }

    #[test]
    fn any_position_continues_the_same_stream() {
        let dataset = dataset(&[3, 4, 5, 6, 7]);
        let mut whole = Batches::new(&dataset, 2, 7, Position::default()).unwrap();
        for _ in 0..11 {
            let mut resumed = Batches::new(&dataset, 2, 7, whole.position()).unwrap();
            let (a, b) = (whole.next(&Device::Cpu).unwrap(), resumed.next(&Device::Cpu).unwrap());
            assert_eq!(a.input_ids.to_vec2::<u32>().unwrap(), b.input_ids.to_vec2::<u32>().unwrap());
            assert_eq!(whole.position(), resumed.position());
        }
    }

    #[test]
    fn seeds_differ_and_bad_settings_are_refused() {
        let dataset = dataset(&[2; 50]);
        let first = |seed| {
            let mut batches = Batches::new(&dataset, 50, seed, Position::default()).unwrap();
            firsts(&batches.next(&Device::Cpu).unwrap())
        };
        assert_eq!(first(1), first(1));
        assert_ne!(first(1), first(2));
        assert!(Batches::new(&dataset, 0, 0, Position::default()).is_err());
        assert!(Batches::new(&dataset, 1, 0, Position { epoch: 0, used: 51 }).is_err());
        assert!(in_order(&dataset, 0, &Device::Cpu).is_err());
    }
}
