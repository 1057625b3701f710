//! Pictures as a vision model reads them, by the rules of its `preprocessor_config.json`.
//!
//! - resize: to height and width, or the short side to a length; then cut out the middle
//! - pixels: `(value · rescale_factor − mean) / std` by channel
//!
//! Resizing is Pillow's, which most checkpoints were trained with: the filter grows with the reduction, and values are rounded to bytes after each direction.

mod resample;

use std::path::Path;

use ::image::{ImageReader, RgbImage};
use burn::tensor::{Device, Tensor, TensorData};
use serde::Deserialize;
use serde_json::{Map, Value};

use self::resample::{Filter, Picture, resize};
use crate::{Error, Result};

/// What makes pixels of pictures.
#[derive(Clone, Debug, PartialEq)]
pub struct ImageProcessor {
    resize: Option<(Target, Filter)>,
    /// Height and width.
    crop: Option<[usize; 2]>,
    /// What bytes are multiplied by.
    factor: f64,
    mean: [f64; 3],
    std: [f64; 3],
}

/// What a picture is resized to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Target {
    Exact { height: usize, width: usize },
    ShortSide(usize),
}

/// `preprocessor_config.json`; what it leaves out is as ViT has it.
#[derive(Deserialize)]
#[serde(default)]
struct File {
    do_resize: bool,
    size: Size,
    resample: u8,
    do_center_crop: bool,
    crop_size: Size,
    do_rescale: bool,
    rescale_factor: f64,
    do_normalize: bool,
    image_mean: [f64; 3],
    image_std: [f64; 3],
}

impl Default for File {
    fn default() -> Self {
        Self {
            do_resize: true,
            size: Size::Side(224),
            resample: 2,
            do_center_crop: false,
            crop_size: Size::Side(224),
            do_rescale: true,
            rescale_factor: 1.0 / 255.0,
            do_normalize: true,
            image_mean: [0.5; 3],
            image_std: [0.5; 3],
        }
    }
}

#[derive(Clone, Copy, Deserialize)]
#[serde(untagged, expecting = "expected a number, height and width, or shortest_edge")]
enum Size {
    Side(usize),
    Both { height: usize, width: usize },
    Short { shortest_edge: usize },
}

/// No picture that a model reads comes near; a hostile file must not become an allocation.
const LARGEST: usize = 1 << 14;

impl ImageProcessor {
    /// Reads `preprocessor_config.json` of a model folder.
    ///
    /// # Errors
    /// When it is missing, malformed or asks for what is not supported.
    pub fn from_dir(dir: &Path) -> Result<Self> {
        let path = dir.join("preprocessor_config.json");
        let text = std::fs::read_to_string(&path).map_err(Error::io(&path))?;
        let malformed = |e: serde_json::Error| Error::format(&path, e.to_string());
        let mut json: Map<String, Value> = serde_json::from_str(&text).map_err(malformed)?;
        // As in `config.json`, null is what is not said.
        json.retain(|_, value| !value.is_null());
        let file: File = serde_json::from_value(Value::Object(json)).map_err(malformed)?;
        Self::new(&file).map_err(|what| Error::format(&path, what))
    }

    fn new(file: &File) -> std::result::Result<Self, String> {
        let checked = |field: &str, side: usize| {
            if (1..=LARGEST).contains(&side) {
                Ok(side)
            } else {
                Err(format!("`{field}`: expected 1 to {LARGEST} pixels, found {side}"))
            }
        };
        let target = match file.size {
            Size::Side(side) => Target::Exact { height: checked("size", side)?, width: checked("size", side)? },
            Size::Both { height, width } => {
                Target::Exact { height: checked("size", height)?, width: checked("size", width)? }
            }
            Size::Short { shortest_edge } => Target::ShortSide(checked("size", shortest_edge)?),
        };
        let crop = match file.crop_size {
            Size::Side(side) => [side, side],
            Size::Both { height, width } => [height, width],
            Size::Short { .. } if file.do_center_crop => {
                return Err("`crop_size`: expected height and width".to_owned());
            }
            Size::Short { shortest_edge } => [shortest_edge; 2],
        };
        let filter = Filter::of(file.resample);
        let filter = filter
            .ok_or_else(|| format!("`resample`: expected 2 (bilinear) or 3 (bicubic), found {}", file.resample))?;
        if let Some(std) = file.image_std.iter().find(|std| !(std.is_finite() && **std > 0.0)) {
            return Err(format!("`image_std`: expected positive numbers, found {std}"));
        }
        let [height, width] = crop;
        Ok(Self {
            resize: file.do_resize.then_some((target, filter)),
            crop: file.do_center_crop.then_some([checked("crop_size", height)?, checked("crop_size", width)?]),
            factor: if file.do_rescale { file.rescale_factor } else { 1.0 },
            mean: if file.do_normalize { file.image_mean } else { [0.0; 3] },
            std: if file.do_normalize { file.image_std } else { [1.0; 3] },
        })
    }

    /// The pixels of a PNG or JPEG file, `[1, 3, height, width]`.
    ///
    /// # Errors
    /// When it cannot be read, is no picture, or is smaller than what is cut out of it.
    pub fn read(&self, path: &Path, device: &Device) -> Result<Tensor<4>> {
        let reader = ImageReader::open(path).map_err(Error::io(path))?;
        let reader = reader.with_guessed_format().map_err(Error::io(path))?;
        let picture = reader.decode().map_err(|e| Error::format(path, e.to_string()))?;
        self.pixels(&picture.to_rgb8(), device).map_err(|what| Error::format(path, what))
    }

    /// The pixels of a picture in memory: rows of red, green and blue.
    ///
    /// # Errors
    /// When the values are not `height · width · 3`, or the picture is smaller than what is cut out of it.
    pub fn pixels_of(&self, values: Vec<u8>, height: usize, width: usize, device: &Device) -> Result<Tensor<4>> {
        let refuse = |found: String| Error::Input { expected: format!("{height} × {width} × 3 bytes"), found };
        let count = values.len();
        let side = |side: usize| u32::try_from(side).map_err(|_| refuse(format!("a side of {side} pixels")));
        let picture = RgbImage::from_raw(side(width)?, side(height)?, values);
        let picture = picture.ok_or_else(|| refuse(format!("{count} bytes")))?;
        let expected = "a picture".to_owned();
        self.pixels(&picture, device).map_err(|found| Error::Input { expected, found })
    }

    fn pixels(&self, picture: &RgbImage, device: &Device) -> std::result::Result<Tensor<4>, String> {
        let mut picture = Picture::of(picture);
        if picture.height == 0 || picture.width == 0 {
            return Err("a picture without pixels".to_owned());
        }
        if let Some((target, filter)) = self.resize {
            let [height, width] = target.size(picture.height, picture.width)?;
            picture = resize(&picture, height, width, filter);
        }
        if let Some([height, width]) = self.crop {
            picture = picture.middle(height, width).ok_or_else(|| {
                let Picture { height: rows, width: columns, .. } = picture;
                format!("{rows} × {columns} pixels are too few to cut out {height} × {width}")
            })?;
        }
        let Picture { height, width, values } = &picture;
        let channel = |c: usize| values.iter().skip(c).step_by(3).map(move |value| (c, *value));
        let normed = (0..3).flat_map(channel).map(|(c, value)| {
            let value = (f64::from(value) * self.factor) as f32;
            (value - self.mean[c] as f32) / self.std[c] as f32
        });
        let data = TensorData::new(normed.collect::<Vec<f32>>(), [1, 3, *height, *width]);
        Ok(Tensor::from_data(data, device))
    }
}

impl Target {
    /// Height and width of what a picture of that size becomes.
    fn size(self, height: usize, width: usize) -> std::result::Result<[usize; 2], String> {
        match self {
            Self::Exact { height, width } => Ok([height, width]),
            Self::ShortSide(side) => {
                let (short, long) = (height.min(width), height.max(width));
                let long = side * long / short;
                if long > LARGEST {
                    return Err(format!("{height} × {width} pixels are too long and narrow"));
                }
                Ok(if height <= width { [side, long] } else { [long, side] })
            }
        }
    }
}
