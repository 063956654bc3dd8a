//! The exact text that Metal is given, through stock clang as "C++ for `OpenCL` 2021".
//!
//! It finds missing and clashing address spaces, threadgroup arrays outside a kernel, doubles, statics, mutable
//! globals, and everything that is not C++. What it lets through is `lint.rs`'s business.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]

mod common;

use candlewick_kernels::Target;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Metal has no generic address space, no program-scope variables and no doubles: so must clang not.
const FLAGS: [&str; 16] = [
    "-x",
    "cl",
    "-cl-std=clc++2021",
    "-cl-no-stdinc",
    "-fsyntax-only",
    "-target",
    "x86_64-unknown-linux-gnu",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-unknown-attributes",
    "-Wno-unused-function",
    "-Wno-unused-parameter",
    "-Wno-sign-compare",
    "-Xclang",
    "-cl-ext=-__opencl_c_generic_address_space,-__opencl_c_pipes,-__opencl_c_device_enqueue,\
     -__opencl_c_program_scope_global_variables,-__opencl_c_fp64,-cl_khr_fp64",
];

fn clang() -> Option<&'static str> {
    let found =
        Command::new("clang-19").arg("--version").output().is_ok_and(|output| output.status.success());
    if !found {
        // Not println!, which the test runner keeps to itself when a test passes.
        std::io::stderr().write_all(b"skipped: clang-19 not found\n").unwrap();
    }
    found.then_some("clang-19")
}

fn compile(clang: &str, file: &Path, text: &str) -> Result<(), String> {
    std::fs::write(file, text).unwrap();
    let include = concat!("-I", env!("CARGO_MANIFEST_DIR"), "/tests/metal");
    let output = Command::new(clang).args(FLAGS).arg(include).arg(file).output().unwrap();
    if output.status.success() { Ok(()) } else { Err(String::from_utf8_lossy(&output.stderr).into_owned()) }
}

fn folder(name: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    std::fs::create_dir_all(&folder).unwrap();
    folder
}

#[test]
fn clang_accepts_the_metal_text() {
    let Some(clang) = clang() else { return };
    let folder = folder("metal_text");
    let texts = common::texts(Target::Metal);
    let failures = common::failures(&texts, |index, text| {
        compile(clang, &folder.join(format!("{index}.metal")), &text.source)
    });
    println!("clang-19: {} Metal texts, {} rejected", texts.len(), failures.len());
    assert!(failures.is_empty(), "{}", failures[..failures.len().min(5)].join("\n"));
}

/// Each is wrong on Metal, and each must be rejected: otherwise the test above proves nothing.
const ILLEGAL: [(&str, &str, &str); 17] = [
    ("unqualified pointer", "DEVFN float f(const float* p) { return p[0]; }", "y[i] = f(x);"),
    (
        "device pointer for a threadgroup one",
        "DEVFN float f(THREADGROUP float* p) { return p[0]; }",
        "y[i] = f(x);",
    ),
    ("cast across address spaces", "", "THREADGROUP float* q = (THREADGROUP float*)y; q[i] = 1.0f;"),
    (
        "threadgroup array in a helper",
        "DEVFN float f() { TG_ARRAY(float, q, 4); q[0] = 1.0f; return q[0]; }",
        "y[i] = f();",
    ),
    ("threadgroup array in a block", "", "if (i < 4u) { TG_ARRAY(float, q, 4); q[i] = 1.0f; y[i] = q[i]; }"),
    ("double", "", "double d = x[i]; y[i] = float(d * d);"),
    ("mutable global", "float total = 0.0f;", "y[i] = total;"),
    ("static in a kernel", "", "static float total = 0.0f; total += x[i]; y[i] = total;"),
    ("function pointer", "DEVFN float f(float v) { return v; }", "float (*g)(float) = f; y[i] = g(x[i]);"),
    ("virtual", "struct B { virtual float f() { return 1.0f; } };", "B b; y[i] = b.f();"),
    ("new", "", "float* q = new float[4]; y[i] = q[0];"),
    ("throw", "", "if (i > 5u) throw 1;"),
    ("std", "", "y[i] = std::max(x[i], 0.0f);"),
    ("misspelt barrier", "", "threadgroup_barier(mem_flags::mem_threadgroup);"),
    ("write through const", "", "x[i] = 1.0f;"),
    ("write to PARAM", "", "p.n = 1u;"),
    ("a function the dialect lacks", "", "y[i] = erf(x[i]);"),
];

#[test]
fn clang_rejects_what_is_not_metal() {
    let Some(clang) = clang() else { return };
    let folder = folder("illegal");
    let dialect = Target::Metal.dialect().text;
    let kernel = |helper: &str, body: &str| {
        format!(
            "{dialect}\nstruct Params {{ uint n; }};\n{helper}\n\
             KERNEL(k, DEVICE const float* x, DEVICE float* y, PARAM(Params, p)) {{\nconst uint i = TID.x;\n{body}\n}}\n"
        )
    };
    let file = folder.join("k.metal");
    compile(clang, &file, &kernel("", "y[i] = x[i] * float(p.n);")).unwrap();
    for (what, helper, body) in ILLEGAL {
        assert!(compile(clang, &file, &kernel(helper, body)).is_err(), "clang accepts: {what}");
    }
    println!("clang-19: {} illegal kernels, all rejected", ILLEGAL.len());
}
