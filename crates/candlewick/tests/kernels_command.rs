//! `wick kernels` prints what a device would be given.

#![expect(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

use assert_cmd::Command;

fn kernels(flags: &[&str]) -> (Option<i32>, String, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_wick")).arg("kernels").args(flags).output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.code(), text(output.stdout), text(output.stderr))
}

#[test]
fn one_op_in_one_type_for_each_target() {
    for (target, word) in
        [("metal", "#include <metal_stdlib>"), ("cuda", "__global__"), ("simulator", "extern")]
    {
        let (code, text, errors) = kernels(&["--target", target, "--op", "rms_norm", "--dtype", "f16"]);
        assert_eq!(code, Some(0), "{errors}");
        assert!(text.contains(word) && text.contains("rms_norm_backward"), "{target}");
        assert!(
            !text.contains("// softmax:") && !text.contains("// rms_norm: rms_norm for float"),
            "{target}"
        );
    }
}

#[test]
fn an_unknown_op_lists_those_there_are() {
    let (code, text, errors) = kernels(&["--op", "rms"]);
    assert_eq!((code, text.as_str()), (Some(1), ""));
    assert!(
        errors.contains("rms_norm") && errors.contains("softmax") && errors.contains("got rms"),
        "{errors}"
    );
}

#[test]
fn an_op_without_kernels_for_a_type_says_so() {
    let (code, text, errors) = kernels(&["--op", "attention", "--dtype", "f32"]);
    assert_eq!((code, text.as_str()), (Some(1), ""));
    assert!(errors.contains("attention has no kernels for float"), "{errors}");
}
