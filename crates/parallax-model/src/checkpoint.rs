//! One checkpoint, whatever its container: configuration, weights by HF name, tokenizer, chat template.

mod generation;
mod resolve;
mod tiny;

use std::{
    collections::HashMap,
    ops::Range,
    path::{Path, PathBuf},
    sync::OnceLock,
};

pub use generation::GenerationDefaults;

use crate::{
    chat_template::ChatTemplate,
    config::ModelConfig,
    error::{ConfigError, OpenError, TemplateError, TokenizerError},
    hub,
    options::WeightDtype,
    tokenizer::{Tokenizer, gguf::GgufVocabulary, tiktoken},
    weights::{Source, WeightIndex, gguf::GgufFile, is_rope_factors, quantized, safetensors},
};

/// Bytes of one tensor in one file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorSpan {
    /// HF name.
    pub name: String,
    /// Index into [`Checkpoint::files`].
    pub file: usize,
    /// Offset of the first byte.
    pub offset: u64,
    /// Number of bytes.
    pub len: u64,
}

#[derive(Debug)]
enum Text {
    /// The chat template with its special tokens beside the tokenizer.
    Json {
        tokenizer: Option<Definition>,
        template: Option<(String, String, String)>,
    },
    Gguf(Box<GgufVocabulary>),
}

/// A tokenizer as a directory has it.
#[derive(Debug)]
enum Definition {
    /// tokenizer.json.
    Json(Vec<u8>),
    /// tiktoken.model with tokenizer_config.json.
    Tiktoken { model: Vec<u8>, settings: Vec<u8> },
}

impl Definition {
    fn tokenizer(&self) -> Result<Tokenizer, TokenizerError> {
        match self {
            Self::Json(bytes) => Tokenizer::from_json(bytes),
            Self::Tiktoken { model, settings } => tiktoken::tokenizer(model, settings),
        }
    }

    /// As a tokenizer.json, tried before it is handed on.
    fn to_json(&self) -> Result<Vec<u8>, TokenizerError> {
        let tokenizer = self.tokenizer()?;
        match self {
            Self::Json(bytes) => Ok(bytes.clone()),
            Self::Tiktoken { .. } => tokenizer.to_json().map(String::into_bytes),
        }
    }

    /// The file that it is in.
    fn file(&self) -> &'static str {
        match self {
            Self::Json(_) => "tokenizer.json",
            Self::Tiktoken { .. } => "tiktoken.model",
        }
    }
}

/// Bytes of weights in memory while they are hashed: one tensor may hold all experts of a layer.
const HASHED_AT_ONCE: usize = 1 << 22;

/// An opened checkpoint. Weights stay on disk until they are asked for.
#[derive(Debug)]
pub struct Checkpoint {
    config: ModelConfig,
    index: WeightIndex,
    text: Text,
    generation: GenerationDefaults,
    location: PathBuf,
    /// Files beside the weights: config.json, tokenizer.json and so on.
    companions: Vec<PathBuf>,
    id: OnceLock<String>,
}

/// A tensor of a checkpoint whose language model is nested beside other towers, under its plain name.
fn language_model_name(name: &str) -> Option<String> {
    for (nested, plain) in [
        ("model.language_model.", "model."),
        ("language_model.model.", "model."),
        ("language_model.lm_head.", "lm_head."),
    ] {
        if let Some(rest) = name.strip_prefix(nested) {
            return Some(format!("{plain}{rest}"));
        }
    }
    None
}

/// The content of a JSON file beside the weights, `null` where there is none.
fn json_of(file: &Path, bytes: Option<&[u8]>) -> Result<serde_json::Value, OpenError> {
    let Some(bytes) = bytes else { return Ok(serde_json::Value::Null) };
    serde_json::from_slice(bytes)
        .map_err(|e| OpenError::Corrupt { path: file.to_owned(), reason: format!("it is no JSON: {e}") })
}

/// A configuration that knows fewer layers than there are weights for is of another model: it would compute, wrongly.
/// Further ones that guess tokens ahead, as many as the configuration says, are no part of the model.
fn check_layers(config: &ModelConfig, index: &WeightIndex) -> Result<(), OpenError> {
    let spare = config.source["num_nextn_predict_layers"].as_u64().and_then(|n| usize::try_from(n).ok());
    let spare = spare.unwrap_or(0);
    let layer = |name: &String| -> Option<usize> {
        name.strip_prefix("model.layers.")?.split_once('.')?.0.parse().ok()
    };
    match index.tensors.keys().filter_map(layer).max() {
        Some(last) if last >= config.n_layers.saturating_add(spare) => {
            Err(OpenError::Config(ConfigError::Invalid {
                field: "n_layers".to_owned(),
                value: config.n_layers.to_string(),
                reason: format!("the checkpoint has weights of layer {last}"),
            }))
        }
        _ => Ok(()),
    }
}

impl Checkpoint {
    /// Opens a `.gguf` file, any part of one, a directory with one, or a directory with config.json and safetensors.
    ///
    /// # Errors
    /// Nothing is there, or what is there is incomplete, truncated, corrupt or of an unsupported architecture; or a file
    /// beside the weights cannot be read, is no JSON where it should be, or has a text where a number belongs.
    pub fn open(path: &Path) -> Result<Self, OpenError> {
        if path.is_dir() {
            return match hub::only_gguf(path).filter(|_| !hub::is_whole(path)) {
                Some(gguf) => Self::open(&gguf),
                None => Self::open_dir(path),
            };
        }
        let named = |error: OpenError| error.within(path);
        Self::from_gguf(GgufFile::open(path).map_err(named)?, path).map_err(named)
    }

    /// The model a user names: `tiny`, a path, or a repository id in the local hub cache.
    ///
    /// # Errors
    /// As [`Self::open`]; and [`OpenError::NotFound`], which lists where was looked.
    pub fn resolve(model: &str) -> Result<Self, OpenError> {
        resolve::resolve(model)
    }

    /// The embedded tiny model.
    ///
    /// # Errors
    /// The embedded files do not fit together: a build mistake.
    pub fn tiny() -> Result<Self, OpenError> {
        tiny::open()
    }

    fn from_gguf(file: GgufFile, path: &Path) -> Result<Self, OpenError> {
        let config = ModelConfig::from_gguf(&file)?;
        let vocabulary = GgufVocabulary::read(&file);
        let index = file.into_index(&config)?;
        check_layers(&config, &index)?;
        Ok(Self {
            config,
            index,
            text: Text::Gguf(Box::new(vocabulary)),
            generation: GenerationDefaults::default(),
            location: path.to_owned(),
            companions: Vec::new(),
            id: OnceLock::new(),
        })
    }

    fn open_dir(dir: &Path) -> Result<Self, OpenError> {
        let read = |name: &str| -> Result<Option<Vec<u8>>, OpenError> {
            let path = dir.join(name);
            match std::fs::read(&path) {
                Ok(bytes) => Ok(Some(bytes)),
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
                Err(source) => Err(OpenError::Io { path, source }),
            }
        };
        let config_path = dir.join("config.json");
        let config = std::fs::read(&config_path)
            .map_err(|source| OpenError::Io { path: config_path.clone(), source })?;
        let generation = read("generation_config.json")?;
        let index = safetensors::open_dir(dir).map_err(|e| e.within(dir))?;
        let settings = read("tokenizer_config.json")?;
        let tokenizer = match read("tokenizer.json")? {
            Some(json) => Some(Definition::Json(json)),
            None => read("tiktoken.model")?.map(|model| Definition::Tiktoken {
                model,
                settings: settings.clone().unwrap_or_else(|| b"{}".to_vec()),
            }),
        };
        let mut opened = Self::from_parts(
            &config,
            generation.as_deref(),
            tokenizer,
            settings.as_deref(),
            read("chat_template.jinja")?.as_deref(),
            index,
            dir,
        )?;
        opened.companions = hub::COMPANIONS.iter().map(|n| dir.join(n)).filter(|p| p.is_file()).collect();
        Ok(opened)
    }

    /// From the texts of an HF directory, wherever they were read from.
    fn from_parts(
        config: &[u8],
        generation: Option<&[u8]>,
        tokenizer: Option<Definition>,
        tokenizer_config: Option<&[u8]>,
        template: Option<&[u8]>,
        mut index: WeightIndex,
        location: &Path,
    ) -> Result<Self, OpenError> {
        let file = location.join("config.json");
        let text = String::from_utf8_lossy(config);
        let mut config = ModelConfig::from_hf_json(&text).map_err(|e| OpenError::from(e).within(&file))?;
        let fields: serde_json::Value = serde_json::from_str(&text).unwrap_or_default();
        index.rename(language_model_name);
        quantized::derive(&mut index, &fields["quantization_config"]).map_err(|e| e.within(location))?;
        check_layers(&config, &index).map_err(|e| e.within(&file))?;
        let generation_file = location.join("generation_config.json");
        let generation = json_of(&generation_file, generation)?;
        // generation_config.json knows end tokens that config.json does not.
        let ids = match &generation["eos_token_id"] {
            serde_json::Value::Array(ids) => ids.iter().filter_map(serde_json::Value::as_u64).collect(),
            one => one.as_u64().into_iter().collect::<Vec<_>>(),
        };
        for id in ids.into_iter().filter_map(|id| u32::try_from(id).ok()) {
            if !config.eos.contains(&id) && (id as usize) < config.vocab {
                config.eos.push(id);
            }
        }
        let generation =
            GenerationDefaults::read(&generation).map_err(|e| OpenError::from(e).within(&generation_file))?;
        config.tied_embeddings |= !index.contains("lm_head.weight");
        let settings = json_of(&location.join("tokenizer_config.json"), tokenizer_config)?;
        let token = |name: &str| {
            let value = &settings[name];
            value.as_str().or_else(|| value["content"].as_str()).unwrap_or_default().to_owned()
        };
        let template = match (template, &settings["chat_template"]) {
            (Some(text), _) => Some(String::from_utf8_lossy(text).into_owned()),
            (None, serde_json::Value::String(text)) => Some(text.clone()),
            // Several named templates: the default one.
            (None, serde_json::Value::Array(list)) => list
                .iter()
                .find(|t| t["name"] == "default")
                .and_then(|t| t["template"].as_str())
                .map(str::to_owned),
            _ => None,
        };
        let template = template.map(|t| (t, token("bos_token"), token("eos_token")));
        Ok(Self {
            config,
            index,
            text: Text::Json { tokenizer, template },
            generation,
            location: location.to_owned(),
            companions: Vec::new(),
            id: OnceLock::new(),
        })
    }

    /// The model's shape.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Where it was opened.
    pub fn location(&self) -> &Path {
        &self.location
    }

    /// The model's tokenizer.
    ///
    /// # Errors
    /// The checkpoint brings none ([`TokenizerError::Missing`]), or it is broken or of an unsupported kind; the file is named.
    pub fn tokenizer(&self) -> Result<Tokenizer, TokenizerError> {
        match &self.text {
            Text::Json { tokenizer: Some(definition), .. } => {
                definition.tokenizer().map_err(|e| e.within(&self.location.join(definition.file())))
            }
            Text::Json { tokenizer: None, .. } => Err(TokenizerError::Missing(self.location.clone())),
            Text::Gguf(vocabulary) if vocabulary.is_empty() => {
                Err(TokenizerError::Missing(self.location.clone()))
            }
            Text::Gguf(vocabulary) => vocabulary.tokenizer().map_err(|e| e.within(&self.location)),
        }
    }

    /// The model's chat template; `None` for a base model.
    ///
    /// # Errors
    /// The template does not compile.
    pub fn chat_template(&self) -> Result<Option<ChatTemplate>, TemplateError> {
        match &self.text {
            Text::Json { template: Some((source, bos, eos)), .. } => {
                ChatTemplate::new(source, bos, eos).map(Some)
            }
            Text::Json { template: None, .. } => Ok(None),
            Text::Gguf(vocabulary) => vocabulary.chat_template(),
        }
    }

    /// What the model's makers sample with, from generation_config.json; nothing for a GGUF file.
    pub fn generation_defaults(&self) -> GenerationDefaults {
        self.generation
    }

    /// Values of a tensor by its HF name, in HF row order.
    ///
    /// # Errors
    /// No such tensor, or the file cannot be read.
    pub fn read_f32(&self, name: &str) -> Result<Vec<f32>, OpenError> {
        self.index.read_f32(name)
    }

    /// Names of all tensors.
    pub fn tensor_names(&self) -> impl Iterator<Item = &str> {
        self.index.tensors.keys().map(String::as_str)
    }

    /// Bytes read from the weight files so far: the headers, and the tensors that were asked for.
    pub fn bytes_read(&self) -> u64 {
        self.index.bytes_read()
    }

    pub(crate) fn index(&self) -> &WeightIndex {
        &self.index
    }

    /// The bytes of a file before its first tensor; `None` for a file without tensors.
    pub fn header_bytes(&self, file: usize) -> Option<u64> {
        self.index.tensors.values().filter(|t| t.file == file).map(|t| t.offset).min()
    }

    /// The bytes that a stage of these layers reads: its layers, and the embedding, final norm and head where
    /// it is the first or the last; and what opening itself reads beyond the files' headers. In the order of the
    /// files.
    pub fn tensor_spans(&self, layers: Range<usize>) -> Vec<TensorSpan> {
        let first = layers.start == 0;
        let last = layers.end >= self.config.n_layers;
        let wanted = |name: &str| match name {
            "model.norm.weight" => last,
            name if is_rope_factors(name) => true,
            // Not the plain names alone: a quantised weight has scales beside it.
            _ if name.starts_with("model.embed_tokens.") => first || (last && self.config.tied_embeddings),
            _ if name.starts_with("lm_head.") => last && !self.config.tied_embeddings,
            other => other
                .strip_prefix("model.layers.")
                .and_then(|rest| rest.split_once('.'))
                .and_then(|(layer, _)| layer.parse().ok())
                .is_some_and(|layer: usize| layers.contains(&layer)),
        };
        let mut spans: Vec<TensorSpan> = self
            .index
            .tensors
            .iter()
            .filter(|(name, _)| wanted(name))
            .map(|(name, t)| TensorSpan { name: name.clone(), file: t.file, offset: t.offset, len: t.len })
            .collect();
        spans.sort_by_key(|s| (s.file, s.offset));
        spans
    }

    /// Bytes in memory of a stage of these layers.
    pub fn stage_bytes(&self, layers: Range<usize>, dtype: WeightDtype) -> u64 {
        if dtype != WeightDtype::Native {
            return self.config.stage_bytes(&layers, dtype);
        }
        let grown: HashMap<String, u64> =
            self.index.derived.values().filter_map(quantized::Derived::in_memory).collect();
        let in_memory = |span: &TensorSpan| grown.get(&span.name).copied().unwrap_or(span.len);
        self.tensor_spans(layers).iter().map(in_memory).sum()
    }

    /// The weight files, in the order that [`TensorSpan::file`] counts.
    pub fn files(&self) -> Vec<PathBuf> {
        self.index.paths()
    }

    /// Small files beside the weights (config.json, tokenizer.json and so on); none for a GGUF file, whose
    /// header holds all of it.
    pub fn companion_files(&self) -> &[PathBuf] {
        &self.companions
    }

    /// Tokenizer, chat template and generation settings as the files of an HF directory.
    ///
    /// # Errors
    /// The checkpoint has a tokenizer that is broken or of an unsupported kind. One without has no such file.
    pub(crate) fn text_files(&self) -> Result<Vec<(String, Vec<u8>)>, TokenizerError> {
        let settings = |template: Option<&str>, bos: &str, eos: &str| {
            let json = serde_json::json!({"chat_template": template, "bos_token": bos, "eos_token": eos,
                "tokenizer_class": "PreTrainedTokenizerFast"});
            ("tokenizer_config.json".to_owned(), format!("{json:#}\n").into_bytes())
        };
        let mut files = Vec::new();
        let mut generation =
            serde_json::json!({"bos_token_id": self.config.bos, "eos_token_id": self.config.eos});
        self.generation.write(&mut generation);
        files.push(("generation_config.json".to_owned(), format!("{generation:#}\n").into_bytes()));
        let mut put = |json: Vec<u8>| files.push(("tokenizer.json".to_owned(), json));
        match &self.text {
            Text::Json { tokenizer, template } => {
                if let Some(definition) = tokenizer {
                    let named = |e: TokenizerError| e.within(&self.location.join(definition.file()));
                    put(definition.to_json().map_err(named)?);
                }
                files.extend(template.as_ref().map(|(t, bos, eos)| settings(Some(t), bos, eos)));
            }
            Text::Gguf(vocabulary) => {
                if !vocabulary.is_empty() {
                    put(self.tokenizer()?.to_json()?.into_bytes());
                }
                let (template, bos, eos) = vocabulary.template();
                files.push(settings(template, bos, eos));
            }
        }
        Ok(files)
    }

    /// Digest of configuration, tensor index and weights: equal ids compute equal values. Hex, 64 characters.
    /// The first call reads all weights.
    ///
    /// # Errors
    /// A file cannot be read.
    pub fn id(&self) -> Result<String, OpenError> {
        if let Some(id) = self.id.get() {
            return Ok(id.clone());
        }
        let mut hash = blake3::Hasher::new();
        hash.update(b"parallax checkpoint v1\0");
        hash.update(self.config.to_hf_json().to_string().as_bytes());
        for (name, info) in &self.index.tensors {
            hash.update(format!("\0{name}\0{:?}\0{}\0", info.shape, info.dtype.name()).as_bytes());
            for first in (0..info.len).step_by(HASHED_AT_ONCE) {
                let len = (info.len - first).min(HASHED_AT_ONCE as u64);
                hash.update(&self.index.files[info.file].read(info.offset + first, len)?);
            }
        }
        Ok(self.id.get_or_init(|| hash.finalize().to_hex().to_string()).clone())
    }

    /// Runs a LongRoPE model (Phi-3 with 128k tokens) beyond the context that it was first trained with, with the
    /// frequencies for long texts for every position. Without this call such a model keeps to its original context,
    /// where the frequencies for short texts hold: which of the two apply must not depend on a request. No effect on
    /// other models.
    ///
    /// # Errors
    /// The configuration does not allow it.
    pub fn with_long_context(mut self) -> Result<Self, OpenError> {
        self.config = self.config.with_long_context()?;
        self.id = OnceLock::new();
        Ok(self)
    }

    /// The same model with other weights, for the engine: a safetensors file in memory, with the names that this checkpoint has.
    /// Tokenizer and template stay behind.
    ///
    /// # Errors
    /// Bytes that are no safetensors file, or have weights of more layers.
    pub fn with_weights(&self, bytes: Vec<u8>) -> Result<Self, OpenError> {
        let index = safetensors::index([Source::memory("weights in memory", bytes)])?;
        check_layers(&self.config, &index)?;
        Ok(Self {
            config: self.config.clone(),
            index,
            text: Text::Json { tokenizer: None, template: None },
            generation: self.generation,
            location: self.location.clone(),
            companions: Vec::new(),
            id: OnceLock::new(),
        })
    }

    pub(crate) fn embedded(
        config: &'static [u8],
        generation: &'static [u8],
        tokenizer: &'static [u8],
        tokenizer_config: &'static [u8],
        weights: &'static [u8],
    ) -> Result<Self, OpenError> {
        let index = safetensors::index([Source::memory("the embedded tiny model", weights)])?;
        Self::from_parts(
            config,
            Some(generation),
            Some(Definition::Json(tokenizer.to_vec())),
            Some(tokenizer_config),
            None,
            index,
            Path::new("tiny"),
        )
    }
}
