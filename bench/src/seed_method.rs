//! The method behind the table that candlewick's first targets came from: a lazy MLX is called many times and only its
//! last result is evaluated. It is shown beside the truth, and has no other use.

use std::process::ExitCode;

use crate::case::{Case, DeviceName, Dtype, Mode, Op, Size};
use crate::protocol::{Reply, Request, Way};
use crate::session::{Session, Start};
use crate::statistics::median;
use crate::{Result, ops, tensors};

/// The operations of that table, with what it said of MLX, in microseconds.
const TABLE: [(Op, usize, usize, f64); 6] = [
    (Op::LoraDelta, 64, 512, 5.79),
    (Op::LoraDelta, 64, 1024, 5.24),
    (Op::LoraDelta, 64, 2048, 11.86),
    (Op::Softmax, 64, 1024, 5.04),
    (Op::LayerNorm, 64, 1024, 2.41),
    (Op::RmsNorm, 64, 1024, 4.96),
];

/// Prints both.
pub fn run(mlx: &Start, device: DeviceName, threads: usize) -> Result<ExitCode> {
    let folder = tempfile::tempdir().map_err(crate::Error::stream)?;
    let mut session = Session::start(mlx, device, threads)?;
    println!("MLX {:?} on {}, microseconds a call", session.hello.versions, device.name());
    println!(
        "| operation | the seed's MLX | last-only, as the seed timed | evaluated together | each evaluated |"
    );
    println!("|---|---|---|---|---|");
    for (op, rows, cols, seed) in TABLE {
        let rank = if op == Op::LoraDelta { 8 } else { 0 };
        let size = Size { rows, cols, out: 0, rank, width: 0 };
        let case = Case { op, size, dtype: Dtype::F32, mode: Mode::Forward, rotate: false, compiled: false };
        let path = folder.path().join("inputs.safetensors");
        tensors::write(&path, &tensors::draw(&case, 1))?;
        let variant = session.hello.variants.first().cloned().unwrap_or_default();
        session.tell(&Request::Prepare { case, variant, eps: ops::EPS, scaling: ops::SCALING })?;
        session.tell(&Request::Inputs { path, copies: 1, warm: true })?;
        let mut us = Vec::new();
        for way in [Way::LastOnly, Way::Pipelined, Way::Synced] {
            let (reply, _) = session.ask(&Request::Time { way, samples: 9, calls: 100 })?;
            let Reply::Times(times) = reply else { return Err(session.unexpected("times", &reply)) };
            us.push(median(&times.samples_us) / 100.0);
        }
        println!("| {} | {seed:.2} | {:.2} | {:.2} | {:.2} |", case.id(), us[0], us[1], us[2]);
    }
    Ok(ExitCode::SUCCESS)
}
