//! Metal's own compiler on every kernel: the first thing to look at on a Mac.

#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

use std::io::Write;

/// Not `println!`, which the test runner keeps to itself when a test passes.
fn say(line: &str) {
    std::io::stderr().write_all(format!("{line}\n").as_bytes()).unwrap();
}

#[test]
#[cfg(not(all(target_os = "macos", feature = "custom-metal")))]
fn metal_compiles_every_kernel() {
    say("skipped: no Metal in this build, so no kernel met its compiler");
}

#[cfg(all(target_os = "macos", feature = "custom-metal"))]
mod on_a_mac {
    use std::collections::BTreeSet;

    use candle_core::Device;
    use candle_fused::{DeviceError, DeviceKind, MetalKernelCompiler};
    use candlewick_kernels::{Launch, Storage, launch_named, ops};

    use super::say;

    fn compiler() -> Option<MetalKernelCompiler> {
        if !DeviceKind::Metal.is_available() {
            say("skipped: this Mac shows no GPU, so no kernel met Metal's compiler");
            return None;
        }
        let device = Device::new_metal(0).unwrap();
        let compiler = MetalKernelCompiler::new(device.as_metal_device().unwrap());
        Some(compiler.unwrap_or_else(|error| panic!("no kernel runs on this GPU: {error}")))
    }

    /// The launches of every op and storage type, each text and entry point once.
    fn launches() -> Vec<Launch> {
        let launches = ops()
            .iter()
            .flat_map(|op| Storage::ALL.map(|storage| op.sample_launches(storage).unwrap()))
            .flatten();
        let mut seen = BTreeSet::new();
        launches
            .filter(|launch| {
                seen.insert((launch.kernel, launch.storage.word(), format!("{:?}", launch.defines)))
            })
            .collect()
    }

    #[test]
    fn metal_compiles_every_kernel() {
        let Some(compiler) = compiler() else { return };
        let launches = launches();
        let failures: Vec<String> = launches
            .iter()
            .filter_map(|launch| compiler.pipeline(launch).err().map(|error| (launch, error)))
            .map(|(launch, error)| {
                format!("{} {:?} {:?}\n{error}", launch.kernel, launch.storage, launch.defines)
            })
            .collect();
        say(&format!("Metal: {} pipelines, {} rejected", launches.len(), failures.len()));
        let tight = launches.iter().filter(|launch| {
            compiler.pipeline(launch).is_ok_and(|pipeline| {
                (launch.threads as usize) > pipeline.max_total_threads_per_threadgroup()
            })
        });
        for launch in tight {
            say(&format!("planned again with fewer threads: {} {:?}", launch.kernel, launch.defines));
        }
        assert!(failures.is_empty(), "{}", failures.join("\n\n"));
    }

    #[test]
    fn pipelines_by_name() {
        let Some(compiler) = compiler() else { return };
        for name in launches().iter().map(|launch| launch.kernel).collect::<BTreeSet<_>>() {
            assert!(launch_named(name, Storage::F32).is_some());
            compiler.create_pipeline(name).unwrap();
        }
        let unknown = compiler.create_pipeline("no_such_kernel").unwrap_err();
        assert_eq!(unknown, DeviceError::UnknownKernel { name: "no_such_kernel".into() });
        // A define that no compiler takes, so that the text does not compile.
        let mut broken = launch_named("softmax", Storage::F32).unwrap();
        broken.defines.push(("float", "3".into()));
        let error = compiler.pipeline(&broken).unwrap_err();
        assert!(
            matches!(&error, DeviceError::Compilation { name, log } if name == "softmax" && !log.is_empty())
        );
    }
}
