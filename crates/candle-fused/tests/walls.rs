//! The walls of docs/architecture.md, held by a search through the sources.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::fs;
use std::path::{Path, PathBuf};

/// The Rust files below a folder of the workspace's `crates`, with their text but for comments.
fn sources(folder: &str) -> Vec<(PathBuf, String)> {
    fn collect(folder: &Path, files: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                collect(&path, files);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                files.push(path);
            }
        }
    }
    let mut files = Vec::new();
    collect(&Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(folder), &mut files);
    assert!(!files.is_empty(), "no sources in {folder}");
    let code = |path: &Path| -> String {
        let text = fs::read_to_string(path).unwrap();
        let code: Vec<&str> = text.lines().filter(|line| !line.trim_start().starts_with("//")).collect();
        code.join("\n")
    };
    files.into_iter().map(|path| (path.clone(), code(&path))).collect()
}

fn assert_absent(folder: &str, words: &[&str]) {
    for (path, text) in sources(folder) {
        for word in words {
            assert!(!text.contains(word), "{} knows {word}", path.display());
        }
    }
}

#[test]
fn ops_know_no_device() {
    let apis = ["cudarc", "objc2", "metal", "std::arch", "core::arch", "unsafe", "target_os", "feature = \""];
    assert_absent("candle-fused/src/ops", &apis);
}

#[test]
fn backends_know_no_ops() {
    for file in sources("candle-fused/src/backend") {
        if file.0.file_name().is_some_and(|name| name != "simulated.rs") {
            assert!(!file.1.contains("crate::ops"), "{} knows an op", file.0.display());
        }
    }
}

#[test]
fn the_kernels_know_neither_candle_nor_an_api() {
    let words = ["candle_core", "candle_fused", "cudarc", "objc2", "unsafe"];
    assert_absent("candlewick-kernels/src", &words);
    let manifest =
        fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../candlewick-kernels/Cargo.toml"))
            .unwrap();
    let (_, dependencies) = manifest.split_once("[dependencies]").unwrap();
    assert!(!dependencies.contains("candle"), "{dependencies}");
}

/// But for its tests and for `release`, which is unsafe to call and calls nothing unsafe.
#[test]
fn unsafe_is_in_the_backends_and_the_loops_alone() {
    for (path, text) in sources("candle-fused/src") {
        let code = text.split("#[cfg(test)]\nmod tests").next().unwrap_or_default();
        let text = code.replace("pub unsafe fn release(", "");
        let inside =
            ["backend", "cpu"].iter().any(|room| path.components().any(|part| part.as_os_str() == *room));
        assert!(inside || !text.contains("unsafe "), "{} is unsafe", path.display());
    }
}
