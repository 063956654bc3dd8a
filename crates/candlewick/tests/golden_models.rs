//! Logits and greedy tokens of tiny random models, as transformers computed them (tests/golden/README.md).

#![expect(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use candlewick::generate::{GenerateOptions, Sampling, generate_tokens};
use candlewick::model::{Decoder, KvCache, ModelFiles, TensorFile, load_frozen};

const MODELS: [&str; 5] = ["llama", "llama3", "qwen2", "qwen3", "mistral"];
/// The bound for f32 logits of magnitude up to about 4.
const TOLERANCE: f32 = 1e-5;

fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

fn open(name: &str) -> (Decoder, TensorFile) {
    let decoder = load_frozen(&ModelFiles::Folder(folder(name)), None, &Device::Cpu).unwrap();
    let expected = TensorFile::open(&folder(name).join("expected.safetensors")).unwrap();
    (decoder, expected)
}

fn ids(expected: &TensorFile, name: &str) -> Tensor {
    expected.load(name, &Device::Cpu).unwrap().to_dtype(DType::U32).unwrap()
}

fn largest_difference(got: &Tensor, expected: &Tensor) -> f32 {
    assert_eq!(got.dims(), expected.dims());
    let difference = (got - expected).unwrap().abs().unwrap();
    difference.flatten_all().unwrap().max(0).unwrap().to_scalar().unwrap()
}

#[test]
fn logits_equal_transformers() {
    for name in MODELS {
        let (decoder, expected) = open(name);
        let got = decoder.forward(&ids(&expected, "input_ids"), None, None).unwrap();
        let want = expected.load("logits", &Device::Cpu).unwrap();
        let difference = largest_difference(&got, &want);
        println!("{name}: logits differ by at most {difference:.1e}");
        assert!(difference <= TOLERANCE, "{name}: {difference:e}");
    }
}

#[test]
fn the_cache_changes_nothing() {
    for name in MODELS {
        let (decoder, expected) = open(name);
        let all = ids(&expected, "input_ids");
        let mut cache = KvCache::new(decoder.config());
        let pieces: Vec<_> = [(0, 5), (5, 1), (6, 11)]
            .into_iter()
            .map(|(start, length)| {
                let piece = all.narrow(1, start, length).unwrap();
                decoder.forward(&piece, Some(&mut cache), None).unwrap()
            })
            .collect();
        let want = expected.load("logits", &Device::Cpu).unwrap();
        let difference = largest_difference(&Tensor::cat(&pieces, 1).unwrap(), &want);
        assert!(difference <= TOLERANCE, "{name}: {difference:e}");
    }
}

#[test]
fn greedy_tokens_equal_transformers() {
    for name in MODELS {
        let (mut tokens, (decoder, expected)) = (Vec::new(), open(name));
        let prompt = ids(&expected, "prompt_ids").flatten_all().unwrap().to_vec1::<u32>().unwrap();
        let mut want = ids(&expected, "greedy_ids").flatten_all().unwrap().to_vec1::<u32>().unwrap();
        let options = GenerateOptions { max_tokens: want.len(), sampling: Sampling::default() };
        // transformers' tokens were taken without regard to the end-of-text token.
        if let Some(end) = want.iter().position(|token| decoder.config().eos_token_ids.contains(token)) {
            want.truncate(end);
        }
        assert!(want.len() > 10, "{name}");
        generate_tokens(&decoder, &prompt, options, |token| {
            tokens.push(token);
            ControlFlow::Continue(())
        })
        .unwrap();
        assert_eq!(tokens, want, "{name}");
    }
}
