//! `adapter_config.json`, field for field as PEFT 0.21 writes it.

use std::collections::BTreeMap;
use std::path::Path;

use fancy_regex::Regex;
use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// Which modules get an adapter.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Modules {
    /// `all-linear`, or a regular expression that a module's whole path must match.
    Pattern(String),
    /// Names; a module matches if its path is the name or ends with `.name`.
    Names(Vec<String>),
}

/// A LoRA configuration: what PEFT calls `LoraConfig`, as far as it is supported here.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct LoraConfig {
    /// The base model, a path or a name.
    pub base_model_name_or_path: Option<String>,
    /// `LORA`.
    pub peft_type: String,
    /// `CAUSAL_LM`.
    pub task_type: Option<String>,
    /// Rank, at least 1.
    pub r: usize,
    /// The delta is scaled by `lora_alpha / r`.
    pub lora_alpha: f64,
    /// Dropout on the adapter's input while training, `0 ≤ p < 1`.
    pub lora_dropout: f32,
    /// Scale by `lora_alpha / √r` instead (rsLoRA, Kalajdzievski 2023).
    pub use_rslora: bool,
    /// Modules that get an adapter. `None` means q and v, PEFT's default for this family.
    pub target_modules: Option<Modules>,
    /// Modules that get none, even when targeted.
    pub exclude_modules: Option<Modules>,
    /// Only these layers, counted from 0. `None` means all.
    pub layers_to_transform: Option<Layers>,
    /// The name before the layer's number, when there is a choice.
    pub layers_pattern: Option<Modules>,
    /// Ranks of single modules, by name or regular expression.
    pub rank_pattern: BTreeMap<String, usize>,
    /// Alphas of single modules, by name or regular expression.
    pub alpha_pattern: BTreeMap<String, f64>,
    /// Only `none` is supported.
    pub bias: String,
    /// Not supported.
    pub use_dora: bool,
    /// Not supported: for weights stored `[in, out]`.
    pub fan_in_fan_out: bool,
    /// Not supported.
    pub modules_to_save: Option<Vec<String>>,
    /// `true`: A is Kaiming-uniform, B zero.
    pub init_lora_weights: serde_json::Value,
    /// Set for adapters that are loaded to generate.
    pub inference_mode: bool,
    /// The base model's revision.
    pub revision: Option<String>,
}

/// One layer or several.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Layers {
    /// One layer.
    One(usize),
    /// Several layers.
    Many(Vec<usize>),
}

impl Default for LoraConfig {
    fn default() -> Self {
        Self {
            base_model_name_or_path: None,
            peft_type: "LORA".into(),
            task_type: Some("CAUSAL_LM".into()),
            r: 8,
            lora_alpha: 8.0,
            lora_dropout: 0.0,
            use_rslora: false,
            target_modules: None,
            exclude_modules: None,
            layers_to_transform: None,
            layers_pattern: None,
            rank_pattern: BTreeMap::new(),
            alpha_pattern: BTreeMap::new(),
            bias: "none".into(),
            use_dora: false,
            fan_in_fan_out: false,
            modules_to_save: None,
            init_lora_weights: true.into(),
            inference_mode: true,
            revision: None,
        }
    }
}

impl LoraConfig {
    /// Reads and validates the text of an `adapter_config.json`; `path` is only named in errors.
    ///
    /// # Errors
    /// Malformed JSON, or an adapter of a kind that is not supported.
    pub fn parse(text: &str, path: &Path) -> Result<Self> {
        let config: Self = serde_json::from_str(text).map_err(|e| Error::model(path, e))?;
        config.validate()?;
        Ok(config)
    }

    /// Checks ranges, and that nothing is asked for that would silently be left out.
    ///
    /// # Errors
    /// Names the field, what it must be, and what it is.
    pub fn validate(&self) -> Result<()> {
        let fail = |message: String| Err(Error::Adapter(message));
        if self.peft_type != "LORA" {
            return fail(format!("peft_type must be LORA, got {}", self.peft_type));
        }
        if let Some(rank) = std::iter::once(&self.r).chain(self.rank_pattern.values()).find(|r| **r == 0) {
            return fail(format!("rank must be at least 1, got {rank}"));
        }
        if !(self.lora_alpha.is_finite() && self.alpha_pattern.values().all(|alpha| alpha.is_finite())) {
            return fail("alpha must be a finite number".into());
        }
        if !(0.0..1.0).contains(&self.lora_dropout) {
            return fail(format!("dropout must be at least 0 and below 1, got {}", self.lora_dropout));
        }
        if self.bias != "none" {
            return fail(format!("bias must be none, got {}", self.bias));
        }
        if self.use_dora {
            return fail("use_dora is not supported".into());
        }
        if self.fan_in_fan_out {
            return fail("fan_in_fan_out is not supported".into());
        }
        if self.modules_to_save.as_ref().is_some_and(|modules| !modules.is_empty()) {
            return fail("modules_to_save is not supported".into());
        }
        Ok(())
    }

    /// The rank of the module at `path`.
    ///
    /// # Errors
    /// A malformed pattern.
    pub fn rank(&self, path: &str) -> Result<usize> {
        Ok(by_pattern(&self.rank_pattern, path)?.unwrap_or(self.r))
    }

    /// The factor on `x·Aᵀ·Bᵀ` of the module at `path`: `alpha / r`, or `alpha / √r` with rsLoRA.
    ///
    /// # Errors
    /// A malformed pattern.
    pub fn scaling(&self, path: &str) -> Result<f32> {
        let alpha = by_pattern(&self.alpha_pattern, path)?.unwrap_or(self.lora_alpha);
        let rank = crate::model::to_f64(self.rank(path)?);
        let divisor = if self.use_rslora { rank.sqrt() } else { rank };
        #[expect(clippy::cast_possible_truncation, reason = "rounding the factor to f32")]
        Ok((alpha / divisor) as f32)
    }

    /// Which of these module paths get an adapter. `all-linear` takes every one but the output projection.
    ///
    /// # Errors
    /// A malformed regular expression, or a target that matches nothing: the error lists what there is.
    pub fn select<'a>(&self, paths: impl Iterator<Item = &'a str>) -> Result<Vec<&'a str>> {
        let paths: Vec<_> = paths.collect();
        let default = Modules::Names(vec!["q_proj".into(), "v_proj".into()]);
        let target = self.target_modules.as_ref().unwrap_or(&default);
        let mut selected = Vec::new();
        for &path in &paths {
            let excluded = match &self.exclude_modules {
                Some(exclude) => exclude.matches(path)?,
                None => false,
            };
            if target.matches(path)? && !excluded && self.has_layer(path) {
                selected.push(path);
            }
        }
        if selected.is_empty() {
            let mut names: Vec<_> =
                paths.iter().map(|path| path.rsplit('.').next().unwrap_or(path)).collect();
            names.sort_unstable();
            names.dedup();
            return Err(Error::Adapter(format!(
                "target_modules {} matches no module; this model has {}",
                serde_json::to_string(target).unwrap_or_default(),
                names.join(", "),
            )));
        }
        Ok(selected)
    }

    /// Whether `layers_to_transform` allows the module: the first number in its path is its layer.
    fn has_layer(&self, path: &str) -> bool {
        let Some(layers) = &self.layers_to_transform else {
            return true;
        };
        let layer = path.split('.').find_map(|part| part.parse::<usize>().ok());
        layer.is_some_and(|layer| match layers {
            Layers::One(one) => *one == layer,
            Layers::Many(many) => many.contains(&layer),
        })
    }
}

impl Modules {
    /// Parses a command line's value: `all-linear`, a comma-separated list of names, or a regular expression.
    #[must_use]
    pub fn from_option(value: &str) -> Self {
        let plain = |c: char| c.is_alphanumeric() || matches!(c, '_' | ',' | ' ');
        if value != "all-linear" && value.chars().all(plain) {
            let names = value.split(',').map(str::trim).filter(|name| !name.is_empty());
            Self::Names(names.map(String::from).collect())
        } else {
            Self::Pattern(value.into())
        }
    }

    fn matches(&self, path: &str) -> Result<bool> {
        match self {
            Self::Pattern(pattern) if pattern == "all-linear" => Ok(path != "lm_head"),
            Self::Pattern(pattern) => full_match(pattern, path),
            Self::Names(names) => Ok(names.iter().any(|name| {
                path.strip_suffix(name.as_str())
                    .is_some_and(|prefix| prefix.is_empty() || prefix.ends_with('.'))
            })),
        }
    }
}

/// Python's `re.fullmatch`.
fn full_match(pattern: &str, path: &str) -> Result<bool> {
    let fail = |e: fancy_regex::Error| Error::Adapter(format!("regular expression {pattern:?}: {e}"));
    let regex = Regex::new(&format!("^(?:{pattern})$")).map_err(fail)?;
    regex.is_match(path).map_err(fail)
}

/// PEFT's lookup in `rank_pattern` and `alpha_pattern`: the key ends the path, at a dot.
fn by_pattern<T: Copy>(patterns: &BTreeMap<String, T>, path: &str) -> Result<Option<T>> {
    for (pattern, value) in patterns {
        if full_match(&format!(r"(.*\.)?({pattern})"), path)? {
            return Ok(Some(*value));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATHS: [&str; 4] = [
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.mlp.up_proj",
        "model.layers.1.self_attn.q_proj",
        "lm_head",
    ];

    fn select(target: Modules, change: impl FnOnce(&mut LoraConfig)) -> Result<Vec<&'static str>> {
        let mut config = LoraConfig { target_modules: Some(target), ..LoraConfig::default() };
        change(&mut config);
        config.select(PATHS.into_iter())
    }

    #[test]
    fn targets_match_as_in_peft() {
        let unchanged = |_: &mut LoraConfig| ();
        assert_eq!(select(Modules::from_option("q_proj"), unchanged).unwrap(), [PATHS[0], PATHS[2]]);
        assert_eq!(select(Modules::from_option("all-linear"), unchanged).unwrap(), PATHS[..3]);
        assert_eq!(select(Modules::from_option(r".*\.0\..*_proj"), unchanged).unwrap(), PATHS[..2]);
        assert_eq!(select(Modules::from_option("lm_head"), unchanged).unwrap(), PATHS[3..]);
        // A name must begin at a dot, and a regular expression must match the whole path.
        assert!(select(Modules::Names(vec!["proj".into()]), unchanged).is_err());
        assert!(select(Modules::Pattern(r"layers\.0\..*".into()), unchanged).is_err());
        let first = |config: &mut LoraConfig| config.layers_to_transform = Some(Layers::Many(vec![1]));
        assert_eq!(select(Modules::from_option("all-linear"), first).unwrap(), PATHS[2..3]);
        let exclude =
            |config: &mut LoraConfig| config.exclude_modules = Some(Modules::from_option("up_proj"));
        assert_eq!(select(Modules::from_option("all-linear"), exclude).unwrap(), [PATHS[0], PATHS[2]]);
    }

    #[test]
    fn a_target_that_matches_nothing_lists_what_there_is() {
        let message = select(Modules::from_option("query"), |_| ()).unwrap_err().to_string();
        assert!(message.contains("query") && message.contains("q_proj"), "{message}");
    }

    #[test]
    fn scaling_follows_alpha_rank_and_patterns() {
        let mut config = LoraConfig { r: 4, lora_alpha: 8.0, ..LoraConfig::default() };
        config.rank_pattern.insert("up_proj".into(), 16);
        let scaling = |config: &LoraConfig, path| config.scaling(path).unwrap();
        assert!((scaling(&config, PATHS[0]) - 2.0).abs() < 1e-7);
        assert!((scaling(&config, PATHS[1]) - 0.5).abs() < 1e-7);
        config.use_rslora = true;
        assert!((scaling(&config, PATHS[0]) - 4.0).abs() < 1e-7);
    }
}
