//! stub
/// i
pub const IGNORED: i64 = -100;
