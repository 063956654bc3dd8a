//! What was compiled on a device, and the plans that were prepared from it.

#![cfg_attr(
    not(any(test, feature = "cuda", all(target_os = "macos", feature = "custom-metal"))),
    expect(dead_code, reason = "a build without a GPU has no executor")
)]

use std::any::{Any, TypeId};
use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use candlewick_kernels::{KernelFile, Launch, Plan, PlanError, Storage, Tuning};

use crate::DeviceError;

/// Compiles for one device.
pub(super) trait Compiler {
    /// A compiled text, which may hold several kernels.
    type Module: Clone;
    /// One of its kernels.
    type Pipeline: Clone;

    /// The text of a launch, compiled.
    fn module(&self, launch: &Launch) -> Result<Self::Module, DeviceError>;

    /// The kernel of a launch in the module of its text.
    fn pipeline(&self, module: &Self::Module, launch: &Launch) -> Result<Self::Pipeline, DeviceError>;
}

/// The compiled kernels of one device. What was refused once is refused again, without asking the compiler.
pub(super) struct Pipelines<M, P>(Mutex<Compiled<M, P>>);

/// A text is told by its file and storage type, a kernel by its name beside these; variants differ in their defines.
struct Compiled<M, P> {
    modules: Variants<(KernelFile, Storage), M>,
    kernels: Variants<(&'static str, KernelFile, Storage), P>,
}

type Defines = Vec<(&'static str, String)>;

struct Variants<N, T>(HashMap<N, Vec<Variant<T>>>);
type Variant<T> = (Defines, Result<T, DeviceError>);

impl<N: Hash + Eq, T: Clone> Variants<N, T> {
    fn get(
        &mut self,
        name: N,
        defines: &Defines,
        make: impl FnOnce() -> Result<T, DeviceError>,
    ) -> Result<T, DeviceError> {
        let variants = self.0.entry(name).or_default();
        if let Some((_, known)) = variants.iter().find(|(known, _)| known == defines) {
            return known.clone();
        }
        let made = make();
        variants.push((defines.clone(), made.clone()));
        made
    }
}

impl<M, P> Default for Pipelines<M, P> {
    fn default() -> Self {
        let (modules, kernels) = (Variants(HashMap::new()), Variants(HashMap::new()));
        Self(Mutex::new(Compiled { modules, kernels }))
    }
}

impl<M: Clone, P: Clone> Pipelines<M, P> {
    /// The kernel of a launch, compiled now if it never was.
    pub(super) fn get(
        &self,
        launch: &Launch,
        compiler: &impl Compiler<Module = M, Pipeline = P>,
    ) -> Result<P, DeviceError> {
        let Compiled { modules, kernels } = &mut *lock(&self.0);
        let Launch { kernel, file, storage, defines, .. } = launch;
        kernels.get((kernel, *file, *storage), defines, || {
            let module = modules.get((*file, *storage), defines, || compiler.module(launch))?;
            compiler.pipeline(&module, launch)
        })
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// How a plan is made. A closure makes it anew for each call; [`kept`] says that it depends on constants alone.
pub(crate) trait Recipe {
    /// The plan for a device and the addresses that will be bound.
    fn plan(&self, tuning: Tuning) -> Result<Plan, PlanError>;

    /// What tells it from others, where its plans are worth keeping.
    fn key(&self) -> Option<&dyn Key> {
        None
    }
}

impl<F: Fn(Tuning) -> Result<Plan, PlanError>> Recipe for F {
    fn plan(&self, tuning: Tuning) -> Result<Plan, PlanError> {
        self(tuning)
    }
}

/// A recipe that can be compared with those of earlier calls.
pub(crate) trait Key: Any + Send + Sync {
    /// Whether `other` is the same recipe.
    fn is(&self, other: &dyn Key) -> bool;

    /// A copy to keep.
    fn keep(&self) -> Box<dyn Key>;
}

/// The recipe `plan(constants)`.
#[derive(Clone, Copy)]
pub(crate) struct Kept<K, F> {
    constants: K,
    plan: F,
}

/// The plan of these constants: the same one for constants that are equal, so that a call finds it prepared. `plan` may
/// hold nothing of its own.
pub(crate) fn kept<K, F>(constants: K, plan: F) -> Kept<K, F>
where
    F: Fn(&K, Tuning) -> Result<Plan, PlanError>,
{
    const { assert!(size_of::<F>() == 0, "what a function captures is not compared") };
    Kept { constants, plan }
}

impl<K, F> Recipe for Kept<K, F>
where
    K: Copy + PartialEq + Send + Sync + 'static,
    F: Fn(&K, Tuning) -> Result<Plan, PlanError> + Copy + Send + Sync + 'static,
{
    fn plan(&self, tuning: Tuning) -> Result<Plan, PlanError> {
        (self.plan)(&self.constants, tuning)
    }

    fn key(&self) -> Option<&dyn Key> {
        Some(self)
    }
}

impl<K, F> Key for Kept<K, F>
where
    K: Copy + PartialEq + Send + Sync + 'static,
    F: Copy + Send + Sync + 'static,
{
    fn is(&self, other: &dyn Key) -> bool {
        (other as &dyn Any).downcast_ref::<Self>().is_some_and(|other| self.constants == other.constants)
    }

    fn keep(&self) -> Box<dyn Key> {
        Box::new(*self)
    }
}

/// Plans that were prepared for a device, by their recipes. Bounded: a training whose batches differ in length meets ever
/// new shapes, and prepares again what it has not seen for long.
pub(super) struct Prepared<T>(Mutex<HashMap<Place, Vec<Known<T>>>>);

type Known<T> = (Box<dyn Key>, Arc<T>);

/// A recipe's type, the elements of the first argument, and whether addresses are aligned: where few recipes meet.
type Place = (TypeId, usize, bool);

/// Places at most, and recipes in each.
const PLACES: usize = 1024;
const RECIPES: usize = 8;

impl<T> Default for Prepared<T> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<T> Prepared<T> {
    /// What was prepared by this recipe for so many elements, or is now.
    pub(super) fn get<E>(
        &self,
        key: &dyn Key,
        elements: usize,
        aligned: bool,
        prepare: impl FnOnce() -> Result<T, E>,
    ) -> Result<Arc<T>, E> {
        let place = (key.type_id(), elements, aligned);
        if let Some(recipes) = lock(&self.0).get(&place)
            && let Some((_, known)) = recipes.iter().find(|(known, _)| key.is(&**known))
        {
            return Ok(known.clone());
        }
        // Not under the lock: to prepare is to compile.
        let prepared = Arc::new(prepare()?);
        let mut places = lock(&self.0);
        if places.len() >= PLACES && !places.contains_key(&place) {
            places.clear();
        }
        let recipes = places.entry(place).or_default();
        if recipes.len() >= RECIPES {
            recipes.remove(0);
        }
        recipes.push((key.keep(), prepared.clone()));
        Ok(prepared)
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use candlewick_kernels::softmax::Softmax;

    use super::*;

    /// Compiles to numbers: a module is how many there were before, a kernel its module and name. Refuses odd modules.
    #[derive(Default)]
    struct Counting(RefCell<Vec<String>>);

    impl Compiler for Counting {
        type Module = usize;
        type Pipeline = (usize, &'static str);

        fn module(&self, launch: &Launch) -> Result<usize, DeviceError> {
            let mut texts = self.0.borrow_mut();
            let text = launch.source(candlewick_kernels::Target::Cuda);
            assert!(!texts.contains(&text), "compiled twice: {launch:?}");
            texts.push(text);
            let module = texts.len() - 1;
            if module.is_multiple_of(2) { Ok(module) } else { Err(refused()) }
        }

        fn pipeline(&self, module: &usize, launch: &Launch) -> Result<Self::Pipeline, DeviceError> {
            Ok((*module, launch.kernel))
        }
    }

    #[test]
    fn a_text_is_compiled_once_and_refused_once() {
        let launches: Vec<Launch> = candlewick_kernels::ops()
            .iter()
            .flat_map(|op| Storage::ALL.map(|storage| op.sample_launches(storage).unwrap()))
            .flatten()
            .collect();
        let (pipelines, compiler) = (Pipelines::default(), Counting::default());
        for _ in 0..2 {
            for launch in &launches {
                let got = pipelines.get(launch, &compiler);
                let text = launch.source(candlewick_kernels::Target::Cuda);
                let module = compiler.0.borrow().iter().position(|known| *known == text).unwrap();
                let expected =
                    if module.is_multiple_of(2) { Ok((module, launch.kernel)) } else { Err(refused()) };
                assert_eq!(got, expected, "{launch:?}");
            }
        }
    }

    fn refused() -> DeviceError {
        DeviceError::Unsupported { what: "odd texts".into() }
    }

    fn softmax(rows: usize, scale: f32) -> Softmax {
        Softmax { rows, columns: 8, storage: Storage::F32, scale, causal_queries: None }
    }

    #[test]
    fn a_plan_is_prepared_once_for_each_recipe_and_alignment() {
        let prepared = Prepared::default();
        let get = |key: &dyn Key, elements, aligned, value: u32| {
            *prepared.get(key, elements, aligned, || Ok::<_, ()>(value)).unwrap()
        };
        let (forward, backward) =
            (kept(softmax(2, 1.0), Softmax::forward), kept(softmax(2, 1.0), Softmax::backward));
        let other = kept(softmax(2, 0.5), Softmax::forward);
        let calls: [(&dyn Key, usize, bool); 5] = [
            (&forward, 16, true),
            (&backward, 16, true),
            (&other, 16, true),
            (&forward, 16, false),
            (&forward, 24, true),
        ];
        for round in 0..3 {
            for ((key, elements, aligned), number) in calls.into_iter().zip(1..) {
                assert_eq!(get(key, elements, aligned, number + 10 * round), number);
            }
        }
        assert!(prepared.get(&kept(softmax(3, 1.0), Softmax::forward), 0, true, || Err(())).is_err());
        assert_eq!(get(&kept(softmax(3, 1.0), Softmax::forward), 0, true, 7), 7, "a failure is not kept");
    }

    #[test]
    fn what_is_kept_is_bounded() {
        let prepared = Prepared::default();
        for scale in 0..50u8 {
            let key = kept(softmax(2, scale.into()), Softmax::forward);
            prepared.get(&key, 16, true, || Ok::<_, ()>(scale)).unwrap();
        }
        let again = |scale: u8| {
            *prepared
                .get(&kept(softmax(2, scale.into()), Softmax::forward), 16, true, || Ok::<_, ()>(99))
                .unwrap()
        };
        assert_eq!([again(49), again(43), again(3)], [49, 43, 99]);
        for elements in 0..3 * PLACES {
            let key = kept(softmax(2, 1.0), Softmax::forward);
            prepared.get(&key, elements, true, || Ok::<_, ()>(1)).unwrap();
            assert!(lock(&prepared.0).len() <= PLACES);
        }
    }
}
