//! What the command says to input that cannot work, and that it then leaves everything as it was.

#![expect(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

use std::fs;
use std::path::{Path, PathBuf};

use assert_cmd::Command;
use serde_json::{Map, Value, json};
use tempfile::TempDir;

/// A tiny Llama with a tokenizer of 64 words, data to train it on, and a place for the adapter.
struct Place {
    root: TempDir,
}

impl Place {
    fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/llama");
        let place = Self { root };
        fs::create_dir(place.path("model")).unwrap();
        for name in ["config.json", "model.safetensors"] {
            fs::copy(golden.join(name), place.path("model").join(name)).unwrap();
        }
        let words: Map<String, Value> = (0..64).map(|id| (format!("w{id}"), id.into())).collect();
        let tokenizer = json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
            "pre_tokenizer": {"type": "Whitespace"}, "post_processor": null, "decoder": null,
            "model": {"type": "WordLevel", "vocab": words, "unk_token": "w63"}
        });
        fs::write(place.path("model/tokenizer.json"), tokenizer.to_string()).unwrap();
        fs::create_dir(place.path("data")).unwrap();
        place.data("{\"text\": \"w1 w2 w3 w4\"}\n{\"text\": \"w2 w3 w4 w5\"}\n");
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    fn data(&self, rows: &str) {
        fs::write(self.path("data/train.jsonl"), rows).unwrap();
        fs::write(self.path("data/valid.jsonl"), "{\"text\": \"w1 w2 w3\"}\n").unwrap();
    }

    /// `wick train` on this place with more flags.
    fn train(&self, flags: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_wick"));
        command.current_dir(self.root.path());
        command.args(["train", "--model", "model", "--data", "data", "--adapter-path", "adapters"]);
        command.args(["--device", "cpu", "--iters", "3", "--batch-size", "2"]).args(flags);
        command
    }

    /// The command must fail, say all of these words on at most one screen, and write nothing.
    fn refuses(&self, mut command: Command, words: &[&str]) {
        let output = command.output().unwrap();
        let message = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{message}");
        for word in words {
            assert!(message.contains(word), "expected {word:?} in: {message}");
        }
        assert!(message.lines().count() <= 24, "{message}");
        assert!(!self.path("adapters").exists(), "nothing may be written: {message}");
    }
}

#[test]
fn the_place_itself_works() {
    let place = Place::new();
    place.train(&[]).assert().success();
    for name in ["adapter_config.json", "adapter_model.safetensors", "metrics.jsonl", "loss.svg"] {
        assert!(place.path("adapters").join(name).is_file(), "{name}");
    }
}

/// Neither weights nor data nor a tokenizer: what wick carries serves.
#[test]
fn random_weights_need_a_configuration_alone() {
    let place = Place::new();
    fs::remove_file(place.path("model/model.safetensors")).unwrap();
    place.refuses(place.train(&[]), &["model.safetensors"]);
    place.train(&["--random-weights"]).assert().success();

    let config = fs::read_to_string(place.path("model/config.json")).unwrap();
    let mut config: Value = serde_json::from_str(&config).unwrap();
    config["vocab_size"] = 4096.into();
    fs::create_dir(place.path("shape")).unwrap();
    fs::write(place.path("shape/config.json"), config.to_string()).unwrap();
    let train = |folder: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_wick"));
        command.current_dir(place.root.path()).args(["train", "--model", "shape", "--random-weights"]);
        command.args(["--adapter-path", folder, "--device", "cpu", "--iters", "2", "--dtype", "bf16"]);
        command.args(["--max-seq-length", "16", "--truncate", "--val-batches", "1"]);
        let output = command.output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    let printed = train("first");
    assert!(printed.contains("tokens/s, peak memory "), "{printed}");
    train("second");
    let adapter = |folder: &str| fs::read(place.path(folder).join("adapter_model.safetensors")).unwrap();
    assert_eq!(adapter("first"), adapter("second"), "the seed decides the weights");
}

#[test]
fn missing_files_are_named() {
    for (missing, word) in [
        ("model/config.json", "config.json"),
        ("model/tokenizer.json", "tokenizer.json"),
        ("model/model.safetensors", "model.safetensors"),
        ("data/train.jsonl", "train.jsonl"),
    ] {
        let place = Place::new();
        fs::remove_file(place.path(missing)).unwrap();
        place.refuses(place.train(&[]), &[word]);
    }
}

#[test]
fn damaged_weights_are_named() {
    let place = Place::new();
    let path = place.path("model/model.safetensors");
    let whole = fs::read(&path).unwrap();
    for length in [0, 7, 100, whole.len() / 2, whole.len() - 1] {
        fs::write(&path, &whole[..length]).unwrap();
        place.refuses(place.train(&[]), &["model.safetensors", "not a whole safetensors file"]);
    }
    // A header that claims more than there is.
    let mut lying = whole.clone();
    lying[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    fs::write(&path, lying).unwrap();
    place.refuses(place.train(&[]), &["model.safetensors"]);
}

#[test]
fn wrong_shapes_and_unknown_tensors_are_named() {
    let change = |key: &str, value: Value, words: &[&str]| {
        let place = Place::new();
        let path = place.path("model/config.json");
        let mut config: Map<String, Value> = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        config.insert(key.into(), value);
        fs::write(&path, Value::Object(config).to_string()).unwrap();
        place.refuses(place.train(&[]), words);
    };
    change("intermediate_size", 25.into(), &["mlp.gate_proj.weight", "[25, 32]", "[24, 32]"]);
    change("num_hidden_layers", 3.into(), &["model.layers.2.", "missing"]);
    change("num_hidden_layers", 1.into(), &["unknown tensors", "model.layers.1."]);
    change("model_type", "bert".into(), &["model_type", "bert"]);
    change("num_key_value_heads", 3.into(), &["num_key_value_heads"]);
    change("vocab_size", 40.into(), &["tokenizer.json", "64", "40"]);
}

#[test]
fn adapters_that_cannot_be_are_refused() {
    let place = Place::new();
    place.refuses(place.train(&["--rank", "0"]), &["rank", "at least 1"]);
    place.refuses(place.train(&["--dropout", "1"]), &["dropout", "below 1"]);
    place.refuses(place.train(&["--target-modules", "query"]), &["query", "q_proj"]);
    place.refuses(place.train(&["--target-modules", ".*("]), &["regular expression"]);
}

#[test]
fn rows_that_cannot_be_used_are_named_by_line() {
    let place = Place::new();
    let good = "{\"text\": \"w1 w2 w3\"}\n";
    for (rows, words) in [
        (String::new(), ["train.jsonl", "no rows"]),
        ("\n\n".into(), ["train.jsonl", "no rows"]),
        (format!("{good}{{\"text\": 5}}\n"), ["train.jsonl:2", "text"]),
        (format!("{good}\n[1]\n"), ["train.jsonl:3", "object"]),
        (format!("{good}{{\"text\": \"w1\n"), ["train.jsonl:2", "JSON"]),
        (format!("{good}{{\"prompt\": \"w1\", \"completion\": \"w2\"}}\n"), ["train.jsonl:2", "text"]),
        (format!("{good}{{\"messages\": []}}\n"), ["train.jsonl:2", "text"]),
    ] {
        place.data(&rows);
        place.refuses(place.train(&[]), &words);
    }
}

#[test]
fn sequences_that_are_too_long_are_named() {
    let place = Place::new();
    let long = vec!["w5"; 200].join(" ");
    place.data(&format!("{{\"text\": \"w1 w2\"}}\n{{\"text\": \"{long}\"}}\n"));
    place.refuses(place.train(&[]), &["train.jsonl:2", "128"]);
    place.refuses(place.train(&["--max-seq-length", "4096"]), &["4096", "128", "max_position_embeddings"]);
    place.train(&["--truncate"]).assert().success();
}

#[test]
fn a_configuration_file_with_unknown_keys_is_refused() {
    let place = Place::new();
    fs::write(place.path("run.yaml"), "iters: 2\nlearning_rat: 1\n").unwrap();
    place.refuses(place.train(&["-c", "run.yaml"]), &["run.yaml", "learning_rat"]);
}

/// `/dev/full` takes no byte; a small tmpfs would need root. A limit on file sizes fails like a full disk.
#[cfg(unix)]
#[test]
fn a_full_disk_leaves_the_old_adapter_whole() {
    let place = Place::new();
    place.train(&[]).assert().success();
    let read = |name: &str| fs::read(place.path("adapters").join(name)).unwrap();
    let before = ["adapter_config.json", "adapter_model.safetensors"].map(read);
    let wick = env!("CARGO_BIN_EXE_wick");
    // `ulimit -f` counts blocks of 512 or 1024 bytes: 4 is less than the adapter's 5 KB.
    let script = format!(
        "trap '' XFSZ; ulimit -f 4; exec {wick} train --model model --data data --device cpu --iters 6 --batch-size 2 \
         --overwrite --seed 5 --rank 16 --save-every 2"
    );
    let output = Command::new("sh").args(["-c", &script]).current_dir(place.root.path()).output().unwrap();
    let message = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{message}");
    assert!(message.contains("too large") || message.contains("space"), "{message}");
    assert_eq!(before, ["adapter_config.json", "adapter_model.safetensors"].map(read));
}
