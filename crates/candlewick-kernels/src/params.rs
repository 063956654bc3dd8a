//! Small helpers that every op's plan is built with: checked sizes, parameter bytes, tuning.

#![expect(
    clippy::needless_pass_by_value,
    reason = "values to print: numbers and strings alike, made for the call"
)]

use crate::launch::{Buffer, Element, Launch, MAX_THREADS, Plan, PlanError, Role, SIMDGROUP_SIZE};

/// What the executor knows about the device and the addresses it will bind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tuning {
    /// Every buffer's address is a multiple of 16 bytes. Where false, kernels access one element at a time.
    pub aligned: bool,
    /// The most threads a threadgroup may have; at least 32. Lower it when a Metal pipeline allows fewer than
    /// the plan asks for, and plan again.
    pub max_threads: u32,
}

impl Default for Tuning {
    fn default() -> Self {
        Self { aligned: true, max_threads: MAX_THREADS }
    }
}

impl Tuning {
    /// The most simdgroups of a threadgroup.
    pub(crate) fn max_simdgroups(self) -> usize {
        (self.max_threads.clamp(SIMDGROUP_SIZE, MAX_THREADS) / SIMDGROUP_SIZE) as usize
    }
}

/// A size as the kernels hold it.
pub(crate) fn size(op: &'static str, what: &'static str, value: usize) -> Result<u32, PlanError> {
    u32::try_from(value).map_err(|_| shape(op, what, "below 2^32", value))
}

/// A shape error.
pub(crate) fn shape(
    op: &'static str,
    what: &'static str,
    expected: impl ToString,
    got: impl ToString,
) -> PlanError {
    PlanError::Shape { op, what, expected: expected.to_string(), got: got.to_string() }
}

/// The product of sizes, where it fits.
pub(crate) fn product(op: &'static str, what: &'static str, sizes: &[usize]) -> Result<usize, PlanError> {
    sizes
        .iter()
        .try_fold(1_usize, |product, &size| product.checked_mul(size))
        .ok_or_else(|| shape(op, what, "below 2^64", format!("{sizes:?}")))
}

/// A grid dimension.
pub(crate) fn groups(op: &'static str, count: usize) -> Result<u32, PlanError> {
    i32::try_from(count)
        .map(i32::unsigned_abs)
        .map_err(|_| shape(op, "number of threadgroups", "below 2^31", count))
}

/// A small number, known to fit, as u32.
pub(crate) fn small(value: usize) -> u32 {
    u32::try_from(value).unwrap_or(u32::MAX)
}

/// The bytes of a PARAM struct, field by field, in the machine's own (little-endian) order.
#[derive(Default)]
pub(crate) struct Params(Vec<u8>);

impl Params {
    pub(crate) fn u32(mut self, value: u32) -> Self {
        self.0.extend_from_slice(&value.to_le_bytes());
        self
    }

    pub(crate) fn f32(mut self, value: f32) -> Self {
        self.0.extend_from_slice(&value.to_le_bytes());
        self
    }

    pub(crate) fn bytes(self) -> Vec<u8> {
        self.0
    }
}

/// `#define name value` for the text.
pub(crate) fn define(name: &'static str, value: impl ToString) -> (&'static str, String) {
    (name, value.to_string())
}

/// `#define name 1` or `0`.
pub(crate) fn flag(name: &'static str, value: bool) -> (&'static str, String) {
    define(name, u8::from(value))
}

/// Collects a plan's buffers and hands out their indices.
#[derive(Default)]
pub(crate) struct Buffers(Vec<Buffer>);

impl Buffers {
    pub(crate) fn input(&mut self, name: &'static str, element: Element, len: usize) -> usize {
        self.push(Buffer { name, element, len, role: Role::Input })
    }

    pub(crate) fn output(&mut self, name: &'static str, element: Element, len: usize) -> usize {
        self.push(Buffer { name, element, len, role: Role::Output })
    }

    pub(crate) fn scratch(&mut self, name: &'static str, element: Element, len: usize) -> usize {
        self.push(Buffer { name, element, len, role: Role::Scratch })
    }

    fn push(&mut self, buffer: Buffer) -> usize {
        self.0.push(buffer);
        self.0.len() - 1
    }

    /// The plan of these buffers.
    pub(crate) fn plan(self, launches: Vec<Launch>) -> Plan {
        Plan { buffers: self.0, launches }
    }
}
