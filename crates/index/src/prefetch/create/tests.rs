use soci_ztoc::{BuildOptions, Compression, DecodeLimits, ZtocBuilder};

use super::*;

#[derive(Default)]
struct Warnings(std::sync::Mutex<Vec<String>>);

impl Observer for Warnings {
    fn line(&self, _: &str) {}
    fn warn(&self, text: &str) {
        self.0.lock().unwrap().push(text.to_owned());
    }
}

/// A layer of `(name, kind, link or content)` with spans of 1 KiB.
fn layer(entries: &[(&str, char, &str)]) -> (Digest, Ztoc) {
    let mut tar = tar::Builder::new(Vec::new());
    for (name, kind, text) in entries {
        let mut header = tar::Header::new_gnu();
        header.set_mode(0o755);
        header.set_size(0);
        match kind {
            'f' => {
                header.set_size(text.len() as u64);
                tar.append_data(&mut header, name, text.as_bytes()).unwrap();
            }
            'd' => {
                header.set_entry_type(tar::EntryType::Directory);
                tar.append_data(&mut header, name, &b""[..]).unwrap();
            }
            's' => {
                header.set_entry_type(tar::EntryType::Symlink);
                tar.append_link(&mut header, name, text).unwrap();
            }
            _ => {
                header.set_entry_type(tar::EntryType::Link);
                tar.append_link(&mut header, name, text).unwrap();
            }
        }
    }
    let bytes = tar.into_inner().unwrap();
    let options = BuildOptions { span_size: 1024, build_tool: "test".into() };
    let mut builder = ZtocBuilder::new(Compression::Uncompressed, options).unwrap();
    builder.push(&bytes).unwrap();
    let built = builder.finish().unwrap();
    (built.layer_digest, Ztoc::decode(built.bytes.into(), &DecodeLimits::default()).unwrap())
}

fn image(layers: &[&[(&str, char, &str)]]) -> Layers {
    let mut image = Layers::default();
    for entries in layers {
        let (digest, ztoc) = layer(entries);
        image.push(digest, &ztoc);
    }
    image
}

/// Returns layer position and ranges for one path.
fn find(image: &Layers, path: &str) -> Option<(usize, Vec<(i32, i32)>)> {
    let created = create(image, &[path.to_owned()], &Warnings::default());
    let (digest, prefetch) = created.into_iter().next()?;
    let position = image.layers.iter().position(|layer| layer.digest == digest).unwrap();
    Some((position, prefetch.prefetch_spans.iter().map(|range| (range.start_span, range.end_span)).collect()))
}

#[test]
fn a_file_is_found_however_its_path_is_written() {
    let image = image(&[&[("./bin/", 'd', ""), ("./bin/sh", 'f', "x")]]);
    for path in ["/bin/sh", "bin/sh", " //bin/./sh ", "bin/../bin/sh"] {
        assert_eq!(find(&image, path), Some((0, vec![(1, 1)])), "{path}");
    }
    for path in ["/bin", "/bin/s", "/bin/sh/x", "", "/"] {
        assert_eq!(find(&image, path), None, "{path}");
    }
}

#[test]
fn a_file_that_ends_where_a_span_ends_takes_no_further_span() {
    let content = "x".repeat(1024 + 512);
    let image = image(&[&[("a", 'f', &content), ("b", 'f', "")]]);
    // Header in span 0, data from byte 512 to 2048.
    assert_eq!(find(&image, "a"), Some((0, vec![(0, 1)])));
    assert_eq!(find(&image, "b"), Some((0, vec![(2, 2)])));
}

#[test]
fn the_topmost_layer_wins_and_removals_count() {
    let image = image(&[
        &[("a", 'f', "1"), ("b", 'f', "1"), ("d/e", 'f', "1"), ("o/f", 'f', "1"), ("r/f", 'f', "1")],
        &[("a", 'f', "2"), (".wh.b", 'f', ""), ("o/.wh..wh..opq", 'f', ""), (".wh.r", 'f', "")],
        &[("r/g", 'f', "3"), ("r/f", 'f', "3")],
    ]);
    assert_eq!(find(&image, "a").unwrap().0, 1);
    assert_eq!(find(&image, "d/e").unwrap().0, 0);
    assert_eq!(find(&image, "b"), None);
    assert_eq!(find(&image, "o/f"), None);
    assert_eq!(find(&image, "r/f").unwrap().0, 2);
}

#[test]
fn links_are_followed_across_layers_and_loops_end() {
    let image = image(&[
        &[("usr/bin/sh", 'f', "1"), ("bin", 's', "usr/bin"), ("usr/bin/ash", 'h', "usr/bin/sh")],
        &[
            ("init", 's', "/bin/sh"),
            ("up/link", 's', "../bin/ash"),
            ("loop", 's', "loop"),
            ("one", 's', "two"),
            ("two", 's', "one"),
            ("dangling", 's', "nowhere"),
        ],
    ]);
    for path in ["init", "bin/sh", "up/link", "/bin/ash"] {
        assert_eq!(find(&image, path), Some((0, vec![(0, 0)])), "{path}");
    }
    for path in ["loop", "one", "dangling", "bin"] {
        assert_eq!(find(&image, path), None, "{path}");
    }
}

#[test]
fn what_is_not_found_is_warned_about() {
    let image = image(&[&[("a", 'f', "1")]]);
    let warnings = Warnings::default();
    let created = create(&image, &["a".into(), "/no/such".into(), " ".into()], &warnings);
    assert_eq!(created.len(), 1);
    assert_eq!(*warnings.0.lock().unwrap(), ["prefetch file /no/such not found in any layer"]);
}
